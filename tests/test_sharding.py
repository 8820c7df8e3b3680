"""Sharding of a kind that a fold cannot write to is refused by name, at the start of training and at a fold."""

import pytest
from models import adamw, assert_same_state, llama, state, wrap
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainerControl, TrainerState, TrainingArguments

from poet_peft import POETCallback, merge_and_reinitialize


def with_fsdp1(model, optimizer):
    """A module of FSDP1's class, without the process group that its own constructor asks for."""
    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapper)
    model.add_module("wrapper", wrapper)
    return model, optimizer


def with_zero3(model, optimizer):
    """A parameter with the mark that DeepSpeed ZeRO-3 leaves on those that it takes apart."""
    next(model.parameters()).ds_id = 0
    return model, optimizer


def with_zero1(model, optimizer):
    """accelerate's wrapper around an optimizer of DeepSpeed's, as far as both say what they are."""
    zero = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})()
    wrapper = type("DeepSpeedOptimizerWrapper", (), {"optimizer": zero, "param_groups": []})()
    return model, wrapper


REFUSED = {
    "FSDP1": (with_fsdp1, "FSDP2"),
    "ZeRO-3": (with_zero3, "DDP or FSDP2"),
    "ZeRO-1": (with_zero1, "DDP or FSDP2"),
}
each_refused = pytest.mark.parametrize(("shard", "way_out"), REFUSED.values(), ids=REFUSED)


@each_refused
def test_training_does_not_start(tmp_path, shard, way_out):
    model = wrap(llama(), "periodic")
    model, optimizer = shard(model, adamw(model))
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=way_out):
        POETCallback().on_train_begin(args, TrainerState(), TrainerControl(), model=model, optimizer=optimizer)


@each_refused
def test_fold_changes_nothing(shard, way_out):
    model = wrap(llama(), "periodic")
    model, optimizer = shard(model, adamw(model))
    before = state(model)
    with pytest.raises(ValueError, match=way_out):
        merge_and_reinitialize(model, optimizer)
    assert_same_state(model.state_dict(), before)


def test_deepspeed_without_folds_is_accepted(tmp_path):
    model = wrap(llama(), "block_stochastic")
    model, optimizer = with_zero1(model, adamw(model))
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    POETCallback().on_train_begin(args, TrainerState(), TrainerControl(), model=model, optimizer=optimizer)
