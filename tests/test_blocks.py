"""Which features are rotated, in which blocks, and that the draw is a pure function of its arguments."""

import random

import numpy as np
import pytest
import torch
from cases import CASES, FULLY, for_few, rotated

from poet_peft.maths.blocks import BlockPartition, draw_index, partition_side


BLOCK = "block_stochastic"
ARGUMENTS = {"seed": 3, "module_name": "model.layers.0.mlp.up_proj", "side": "R", "num_reinits": 5}
# The sides of the table's cases, each once.
SIDES = {
    (case.variant, case.block_size, dim): f"{case.name}-{dim}"
    for case in CASES
    for dim in (case.out_features, case.in_features)
    if dim > 1
}

for_every_side = pytest.mark.parametrize(("variant", "block_size", "dim"), SIDES, ids=SIDES.values())


def block_sizes(partition):
    return [partition.block_size] * partition.num_full_blocks + [partition.remainder] * (partition.remainder > 0)


# The index


@for_every_side
def test_index_holds_the_rotated_features_once_each(variant, block_size, dim):
    partition = partition_side(variant, block_size, dim)
    index = draw_index(partition, **ARGUMENTS)
    assert index.dtype == torch.int32
    features = index.tolist()
    assert len(features) == partition.num_rotated == len(set(features))
    assert set(features) <= set(range(dim))


def test_block_stochastic_index_is_a_permutation_that_moves_features():
    features = draw_index(BlockPartition(64, 64, 8), **ARGUMENTS).tolist()
    assert sorted(features) == list(range(64)) != features


@pytest.mark.parametrize("variant", [BLOCK, FULLY])
def test_one_block_leaves_features_in_their_order(variant):
    partition = partition_side(variant, 64, 64)
    assert draw_index(partition, **ARGUMENTS).tolist() == list(range(64))


def test_fully_stochastic_index_is_a_sorted_proper_subset():
    features = draw_index(BlockPartition(64, 16, 16), **ARGUMENTS).tolist()
    assert features == sorted(features)
    # Not simply the first or last ones.
    assert features not in (list(range(16)), list(range(48, 64)))


def test_every_feature_is_drawn_about_equally_often():
    counts = np.zeros(10)
    for seed in range(400):
        counts[draw_index(BlockPartition(10, 5, 5), **{**ARGUMENTS, "seed": seed})] += 1
    # Binomial with mean 200 and standard deviation 10.
    assert counts.min() > 150 and counts.max() < 250


def test_same_arguments_give_the_same_index():
    partition = BlockPartition(64, 64, 8)
    assert torch.equal(draw_index(partition, **ARGUMENTS), draw_index(partition, **ARGUMENTS))


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 4), ("module_name", "model.layers.1.mlp.up_proj"), ("side", "P"), ("num_reinits", 6)],
    ids=["seed", "module_name", "side", "num_reinits"],
)
@pytest.mark.parametrize("num_rotated", [64, 16], ids=[BLOCK, FULLY])
def test_each_argument_changes_the_index(name, value, num_rotated):
    partition = BlockPartition(64, num_rotated, 16)
    other = draw_index(partition, **{**ARGUMENTS, name: value})
    assert not torch.equal(draw_index(partition, **ARGUMENTS), other)


def test_index_does_not_depend_on_the_block_size():
    """The permutation is of the features; blocks are cut out of it afterwards."""
    assert torch.equal(
        draw_index(BlockPartition(64, 64, 8), **ARGUMENTS), draw_index(BlockPartition(64, 64, 16), **ARGUMENTS)
    )


@pytest.mark.parametrize("moved_by", [0, 1, 12345])
def test_index_does_not_depend_on_the_global_generators(moved_by):
    torch.manual_seed(moved_by)
    np.random.seed(moved_by)
    random.seed(moved_by)
    assert draw_index(BlockPartition(10, 10, 4), **ARGUMENTS).tolist() == KNOWN_PERMUTATION


def test_drawing_does_not_move_the_global_generators():
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    draw_index(BlockPartition(64, 64, 8), **ARGUMENTS)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


# Another answer breaks every saved checkpoint.
KNOWN_PERMUTATION = [8, 7, 5, 3, 4, 1, 6, 2, 9, 0]
KNOWN_SUBSET = [3, 5, 7, 8]


def test_known_permutation():
    assert draw_index(BlockPartition(10, 10, 4), **ARGUMENTS).tolist() == KNOWN_PERMUTATION


def test_known_subset():
    assert draw_index(BlockPartition(10, 4, 4), **ARGUMENTS).tolist() == KNOWN_SUBSET


# The partition


@for_every_side
def test_blocks_cover_the_rotated_features(variant, block_size, dim):
    partition = partition_side(variant, block_size, dim)
    assert sum(block_sizes(partition)) == partition.num_rotated
    assert all(size <= partition.block_size for size in block_sizes(partition))


@pytest.mark.parametrize(
    ("block_size", "dim"),
    [(2, 2), (2, 3), (3, 2), (3, 7), (3, 12), (8, 7), (8, 8), (8, 9), (8, 15), (8, 16), (16, 19)],
)
def test_block_stochastic_rotates_every_feature(block_size, dim):
    partition = partition_side(BLOCK, block_size, dim)
    assert partition.num_rotated == dim == sum(block_sizes(partition))
    assert partition.block_size == min(block_size, dim)
    assert partition.remainder == dim % min(block_size, dim)


@pytest.mark.parametrize(("m", "n", "b"), [(16, 24, 8), (64, 32, 16), (8, 8, 8), (6, 4, 2)])
def test_block_stochastic_parameters_are_the_papers(m, n, b):
    count = sum(partition_side(BLOCK, b, dim).num_parameters for dim in (m, n))
    assert count == (m + n) * (b - 1) / 2


@pytest.mark.parametrize(("m", "n", "fraction"), [(16, 24, 0.5), (64, 32, 0.25), (64, 80, 0.125), (6, 4, 1.0)])
def test_fully_stochastic_parameters_are_the_papers(m, n, fraction):
    count = sum(partition_side(FULLY, fraction, dim).num_parameters for dim in (m, n))
    b_out, b_in = m * fraction, n * fraction
    assert count == b_out * (b_out - 1) / 2 + b_in * (b_in - 1) / 2


def test_a_last_smaller_block_has_parameters_of_its_own():
    # 19 = 8 + 8 + 3
    assert partition_side(BLOCK, 8, 19).num_parameters == 28 + 28 + 3


@for_few
def test_layer_has_one_parameter_for_each_pair_of_features_in_a_block(case):
    _, layer = rotated(case)
    for rotation in layer.rotations("default"):
        pairs = sum(size * (size - 1) // 2 for size in block_sizes(rotation.partition))
        assert rotation.weight.shape == (pairs,) == (rotation.partition.num_parameters,)


@pytest.mark.parametrize(
    ("block_size", "dim", "rotated"),
    [
        (0.5, 10, 5),
        (0.5, 11, 5),
        (0.25, 64, 16),
        (0.125, 64, 8),
        (1.0, 7, 7),
        (0.125, 9, 2),
        (0.01, 30, 2),
        (6, 30, 6),
    ],
)
def test_fully_stochastic_rotates_one_block_of_the_fraction(block_size, dim, rotated):
    partition = partition_side(FULLY, block_size, dim)
    assert (partition.num_rotated, partition.num_full_blocks, partition.remainder) == (rotated, 1, 0)


@pytest.mark.parametrize(("block_size", "dim"), [(9, 8), (64, 2)])
def test_fully_stochastic_refuses_a_block_larger_than_the_side(block_size, dim):
    with pytest.raises(ValueError, match=f"block_size={block_size} is larger than a side of {dim} features"):
        partition_side(FULLY, block_size, dim)
