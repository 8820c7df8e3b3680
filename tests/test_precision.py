"""16-bit weights, autocast, gradient scalers, numbers that are not finite: no digit is lost, nothing bad is folded."""

import functools

import pytest
import torch
from cases import Case, normal, randomize, relative_error, rotated
from models import adamw, assert_same_state, llama, logits, poet_config, state, train, wrap
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback
from workers.resume_run import LENGTH, make_trainer, text

from poet_peft import POETCallback, POETFoldError, merge_and_reinitialize
from poet_peft.diagnostics import diagnose
from poet_peft.fold import FoldItem, fold_quietly
from poet_peft.layer import poet_layers
from poet_peft.maths.precision import full_precision
from poet_peft.maths.spectrum import orthogonality_error
from poet_peft.weights.residual import join, split


LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


# Singular values through many folds

NUM_FOLDS = 300


@functools.cache
def drift(dtype, compensated_folds=True):
    """Largest relative change of any singular value in folds that turn by about 0.04 radians each."""
    case = Case("drift", 48, 32, block_size=16, dtype=dtype)
    model, layer = rotated(case, merge_interval=1, compensated_folds=compensated_folds)
    before = torch.linalg.svdvals(layer.base_weight.read_exact(layer.residual).double())
    for fold in range(NUM_FOLDS):
        randomize(model, 0.02, seed=100 + 2 * fold)
        merge_and_reinitialize(model)
    after = torch.linalg.svdvals(layer.base_weight.read_exact(layer.residual).double())
    return float((after / before - 1).abs().max())


@pytest.mark.slow
@LOW
def test_singular_values_survive_hundreds_of_compensated_folds(dtype):
    assert drift(dtype) < 5e-4


@pytest.mark.slow
@LOW
def test_compensation_makes_the_drift_far_smaller(dtype):
    assert drift(dtype) < drift(dtype, compensated_folds=False) / 20


@pytest.mark.slow
@LOW
def test_compensated_folds_drift_about_as_little_as_those_of_fp32_weights(dtype):
    assert drift(dtype) < 2 * drift(torch.float32)


# Splitting a number into 16 bits and a rest


@LOW
def test_split_of_joined_halves_gives_the_same_halves(dtype):
    """So that a file can go to fp32 and back without moving."""
    value = torch.cat([normal(2000, seed=e + 20) * 10.0**e for e in range(-6, 4)])
    rounded, rest = split(value, dtype)
    again, rest_again = split(join(rounded, rest), dtype)
    assert torch.equal(again, rounded)
    assert torch.equal(rest_again, rest)


@LOW
def test_split_of_a_transposed_matrix_is_the_split_transposed(dtype):
    value = normal(6, 8)
    joined = join(*split(value.mT, dtype))
    assert torch.equal(joined.mT, join(*split(value, dtype)))


@LOW
def test_largest_numbers_of_the_dtype_survive(dtype):
    largest = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min])
    assert torch.equal(join(*split(largest, dtype)), largest)


# Files with what folding cut off


def folded(dtype, **overrides):
    """A model whose weights need more digits than 16 bits hold."""
    model = wrap(llama().to(dtype), "periodic", **overrides)
    for num_steps in (2, 1):
        merge_and_reinitialize(model, train(model, num_steps))
    train(model, 1)
    return model.eval()


def exact(model):
    """The rotated layers' weights with all their digits, by name."""
    return {name: layer.base_weight.read_exact(layer.residual) for name, layer in poet_layers(model)}


def loaded(directory, dtype, **kwargs):
    return PeftModel.from_pretrained(llama().to(dtype), directory, **kwargs).eval()


@LOW
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_file_loads_bit_equal_into_a_model_of_its_dtype(tmp_path, dtype, low_cpu_mem_usage):
    model = folded(dtype)
    model.save_pretrained(tmp_path)
    assert_same_state(state(loaded(tmp_path, dtype, low_cpu_mem_usage=low_cpu_mem_usage)), state(model))


@LOW
def test_model_of_a_loaded_file_gives_the_same_logits(tmp_path, dtype):
    model = folded(dtype)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(loaded(tmp_path, dtype)), logits(model))


OTHER_DTYPES = [
    (saved, other)
    for saved in (torch.bfloat16, torch.float16, torch.float32)
    for other in (torch.bfloat16, torch.float16, torch.float32)
    if saved != other
]


@pytest.mark.parametrize(("saved", "other"), OTHER_DTYPES, ids=str)
def test_file_loads_into_a_model_of_another_dtype_with_all_digits(tmp_path, saved, other):
    model = folded(saved)
    model.save_pretrained(tmp_path)
    weights = exact(loaded(tmp_path, other))
    errors = [relative_error(weights[name], expected) for name, expected in exact(model).items()]
    assert max(errors) < 1e-7


@pytest.mark.parametrize(("saved", "other"), OTHER_DTYPES, ids=str)
def test_model_of_another_dtype_holds_the_rounded_weights(tmp_path, saved, other):
    model = folded(saved)
    model.save_pretrained(tmp_path)
    weights = {name: layer.get_base_layer().weight for name, layer in poet_layers(loaded(tmp_path, other))}
    assert_same_state(weights, {name: weight.to(other) for name, weight in exact(model).items()})


@LOW
def test_file_without_compensation_loads_bit_equal(tmp_path, dtype):
    model = folded(dtype, compensated_folds=False)
    model.save_pretrained(tmp_path)
    assert_same_state(state(loaded(tmp_path, dtype)), state(model))


@LOW
def test_file_that_went_through_fp32_is_the_same_again(tmp_path, dtype):
    model = folded(dtype)
    model.save_pretrained(tmp_path / "low")
    loaded(tmp_path / "low", torch.float32).save_pretrained(tmp_path / "fp32")
    loaded(tmp_path / "fp32", dtype).save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("low", "again"))
    assert_same_state(again, first)


# Autocast


@LOW
@pytest.mark.parametrize("regime", ["block_stochastic", "exact_cayley"])
def test_rotations_are_built_in_fp32_under_autocast(dtype, regime):
    model = wrap(llama(), regime)
    _, layer = next(poet_layers(model))
    for rotation in layer.rotations("default"):
        expected = rotation().deltas()
        with torch.autocast("cpu", dtype=dtype):
            actual = rotation().deltas()
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@LOW
def test_rotations_are_orthogonal_to_fp32_under_autocast(dtype):
    _, layer = next(poet_layers(wrap(llama(), "exact_cayley")))
    with torch.autocast("cpu", dtype=dtype):
        blocks = [offset.detach() for rotation in layer.rotations("default") for offset in rotation().deltas()]
    assert max(float(orthogonality_error(G + torch.eye(G.shape[-1]))) for G in blocks) < 2e-6


@pytest.mark.parametrize("regime", ["block_stochastic", "exact_cayley", "fully_stochastic", "periodic"])
def test_gradients_of_rotations_under_autocast_are_those_of_fp32_up_to_rounding(regime):
    gradients = []
    for enabled in (False, True):
        model = wrap(llama(), regime).train()
        input_ids = torch.tensor([text(1)[0]["input_ids"]])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            model(input_ids=input_ids, labels=input_ids).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for n, p in model.named_parameters() if ".poet_" in n]))
    assert relative_error(gradients[1], gradients[0]) < 2e-2


@pytest.mark.parametrize("regime", ["periodic", "pretraining"])
def test_fold_under_autocast_writes_what_one_without_does(regime):
    models = []
    for enabled in (False, True):
        model = wrap(llama(), regime)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            merge_and_reinitialize(model)
        models.append(state(model))
    assert_same_state(models[1], models[0])


# Numbers that are not finite, in Trainer

CASE = {"regime": "periodic", "train_rest": True, "dropout": 0.0, "save_strategy": "steps", "save_steps": 1}


class Spoil(TrainerCallback):
    """Puts a number into a rotation before a step."""

    def __init__(self, value, at):
        self.value, self.at = value, at

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step + 1 == self.at:
            layer = dict(poet_layers(model))[SPOILT]
            layer.poet_P["default"].weight[3] = self.value


SPOILT = "base_model.model.model.layers.1.mlp.up_proj"
SPOILT_NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rotation_that_is_not_finite_is_refused_at_the_fold_by_name(tmp_path, value):
    trainer = make_trainer(CASE, tmp_path)
    trainer.add_callback(Spoil(value, at=4))  # the step of the fold: an earlier one would spoil the others too
    with pytest.raises(POETFoldError, match=f"rotation P of '{SPOILT_NAME}'"):
        trainer.train()


@pytest.mark.parametrize("at", [3, 4], ids=["loss", "rotation"])
def test_base_weights_stay_as_they_were_when_a_fold_is_refused(tmp_path, at):
    """NaN comes into one rotation at the fold's step, or into all of them through the loss."""
    trainer = make_trainer(CASE, tmp_path)
    before = {name: layer.get_base_layer().weight.clone() for name, layer in poet_layers(trainer.model)}
    trainer.add_callback(Spoil(float("nan"), at=at))
    with pytest.raises(POETFoldError):
        trainer.train()
    assert_same_state({name: layer.get_base_layer().weight for name, layer in poet_layers(trainer.model)}, before)


@pytest.mark.parametrize("at", [3, 4], ids=["loss", "rotation"])
def test_refused_fold_writes_no_checkpoint(tmp_path, at):
    trainer = make_trainer(CASE, tmp_path)
    trainer.add_callback(Spoil(float("nan"), at=at))
    with pytest.raises(POETFoldError):
        trainer.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (1, 2, 3)}


def masked(*positions):
    """Training data of which the sequences at some positions have no label."""
    return [
        {**row, "labels": [-100] * LENGTH} if position in positions else row for position, row in enumerate(text(32))
    ]


class InOrder(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def in_order(trainer, dataset):
    trainer.__class__ = InOrder
    trainer.train_dataset = dataset
    return trainer


def test_micro_batch_without_a_label_adds_nothing_to_the_step(tmp_path):
    """Sequences 2 and 3 are the second micro-batch of the first step."""
    weights = []
    for accumulation, batch_size, dataset in ((2, 2, masked(2, 3)), (1, 4, masked(2, 3))):
        case = {**CASE, "eps": 1e-3, "gradient_accumulation_steps": accumulation}
        trainer = make_trainer(case, tmp_path, max_steps=1, per_device_train_batch_size=batch_size)
        in_order(trainer, dataset).train()
        weights.append(state(trainer.model))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_step_without_a_label_leaves_everything_finite(tmp_path):
    trainer = in_order(make_trainer(CASE, tmp_path), masked(2, 3))
    trainer.train()
    assert all(torch.isfinite(tensor.float()).all() for tensor in trainer.model.state_dict().values())


def test_step_without_a_label_counts_as_the_optimizer_step_that_it_is(tmp_path):
    trainer = in_order(make_trainer(CASE, tmp_path), masked(2, 3))
    trainer.train()
    assert {layer.state("default").num_folds for _, layer in poet_layers(trainer.model)} == {2}


@pytest.mark.parametrize("regime", ["block_stochastic", "fully_stochastic", "exact_cayley"])
@pytest.mark.parametrize("shape", [(0, 4, 48), (2, 0, 48), (0, 48)], ids=str)
def test_batch_of_no_tokens_has_zero_gradients(regime, shape):
    _, layer = next(poet_layers(wrap(llama(), regime).train()))
    y = layer(torch.zeros(shape, requires_grad=True))
    y.sum().backward()
    assert y.shape == (*shape[:-1], 48)
    assert all(not rotation.weight.grad.any() for rotation in layer.rotations("default"))


# Steps that a gradient scaler skips

SKIPPED = (2, 5)
# Of the steps 1 to 9 the seven others count; the third and the sixth of them are 4 and 8.
FOLDS_AT = [4, 8]


class Overflow(TrainerCallback):
    """An infinite gradient in some steps, and a record of what the model has become after each."""

    def __init__(self):
        self.folds, self.steps = [], []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step + 1 in SKIPPED:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = float("inf")

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        _, layer = next(poet_layers(model))
        self.folds.append(layer.state("default").num_folds)
        self.steps.append(layer.state("default").num_steps)
        assert optimizer.step_was_skipped == (state.global_step in SKIPPED)


def scaled_trainer(directory, seed=0):
    """A run with the gradient scaler of fp16 training on the CPU, for which accelerate makes none."""
    like = make_trainer(CASE, directory, seed=seed, max_grad_norm=0.0)
    torch.manual_seed(seed)
    model = get_peft_model(llama(seed=seed), poet_config("pretraining", merge_interval=3, seed=seed))
    record = Overflow()
    trainer = Trainer(
        model,
        like.args,
        train_dataset=like.train_dataset,
        callbacks=[POETCallback(), record],
        optimizers=(adamw(model), None),
    )
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    return trainer, record


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    directory = tmp_path_factory.mktemp("scaled")
    trainer, record = scaled_trainer(directory)
    trainer.train()
    return directory, trainer, record


def test_folds_are_scheduled_by_the_steps_that_happened(scaled):
    assert scaled[2].folds == [sum(step >= at for at in FOLDS_AT) for step in range(1, 10)]


def test_skipped_steps_are_not_counted(scaled):
    assert scaled[2].steps == [step - sum(step >= at for at in SKIPPED) for step in range(1, 10)]


def test_steps_are_in_the_checkpoint(scaled):
    tensors = load_file(scaled[0] / "checkpoint-6" / "adapter_model.safetensors")
    assert {tensor[3].item() for name, tensor in tensors.items() if name.endswith("poet_state")} == {4}


@pytest.fixture(scope="module", params=[4, 6])
def scaled_and_resumed(scaled, tmp_path_factory, request):
    trainer, record = scaled_trainer(tmp_path_factory.mktemp("resumed"), seed=7)
    trainer.train(resume_from_checkpoint=str(scaled[0] / f"checkpoint-{request.param}"))
    return request.param, trainer, record


def test_resumed_run_knows_the_steps_that_were_skipped_before(scaled, scaled_and_resumed):
    step, _, record = scaled_and_resumed
    assert record.folds == scaled[2].folds[step:]


def test_resumed_run_with_skipped_steps_ends_bit_equal(scaled, scaled_and_resumed):
    assert_same_state(state(scaled_and_resumed[1].model), state(scaled[1].model))


# Products of fp32 matrices, where a run allows less: TF32 on GPUs, bfloat16 on some CPUs

MATMULS = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "bmm", "baddbmm", "addmm")}


@pytest.fixture
def less_precise():
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


class Precisions(TorchDispatchMode):
    """Those at which products of matrices are computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS or func.namespace == "poet_peft":
            self.seen |= {backend.fp32_precision for backend in MATMULS}
        return func(*args, **kwargs or {})


def fold_without_measures(model, layer):
    layer.advance("default", num_steps=2)
    assert fold_quietly([FoldItem(layer, "default", reinitialize=False)], []) is None


EXACT = {
    "fold": ({"merge_interval": 5}, lambda model, layer: merge_and_reinitialize(model)),
    "fold without measures": ({"merge_interval": 1, "reinit_interval": 0}, fold_without_measures),
    "merge": ({}, lambda model, layer: model.merge_adapter()),
    "conversion": ({}, lambda model, layer: layer.get_delta_weight("default")),
    "blocks": ({}, lambda model, layer: layer.rotations("default")[0]().blocks(with_inverses=True)),
    "differentiable blocks": ({}, lambda model, layer: layer.rotations("default")[0]().deltas()),
    "orthogonality": ({}, lambda model, layer: layer.rotations("default")[0].orthogonality()),
    "diagnostics": ({}, lambda model, layer: diagnose(model)),
}


@pytest.mark.parametrize("name", EXACT)
def test_products_that_must_not_lose_digits_are_in_full_precision(less_precise, name):
    config, operation = EXACT[name]
    model, layer = rotated(Case("exact", 48, 32, block_size=16), **config)
    with Precisions() as precisions:
        operation(model, layer)
    assert precisions.seen == {"ieee"}


@pytest.mark.parametrize("ask", ["high", "medium"])
def test_precision_that_a_run_asked_for_comes_back(ask):
    torch.set_float32_matmul_precision(ask)
    before = [backend.fp32_precision for backend in MATMULS]
    try:
        with full_precision("cpu"):
            pass
        assert ([backend.fp32_precision for backend in MATMULS], torch.get_float32_matmul_precision()) == (before, ask)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_precision_that_is_inherited_stays_so():
    torch.set_float32_matmul_precision("highest")
    try:
        for backend in MATMULS:
            backend.fp32_precision = "none"
        torch.backends.fp32_precision = "tf32"  # as `TrainingArguments(tf32=True)` does
        with full_precision("cpu"):
            assert {backend.fp32_precision for backend in MATMULS} == {"ieee"}
        torch.backends.fp32_precision = "ieee"
        assert {backend.fp32_precision for backend in MATMULS} == {"ieee"}
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
