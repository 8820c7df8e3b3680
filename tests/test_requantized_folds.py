"""Folds into quantized bases: dequantize, fold, quantize anew, and a file that brings exactly this weight back."""

import functools
import shutil
from pathlib import Path

import pytest
import torch
from cases import relative_error
from models import adamw, llama, logits, poet_config, state, step, tokens, train, wrap
from peft import PeftModel, get_peft_model
from quantized import (
    assert_same,
    dequantized,
    for_every_format,
    for_every_library,
    fresh_quantization_error,
    parts,
    quantized_llama,
    rotated_layers,
)
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, PerGroup
from transformers import Trainer, TrainingArguments

from poet_peft import POETCallback, POETCheckpointError, POETConfig, POETFoldError, merge_and_reinitialize


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def wrap_to_fold(base, **overrides):
    return wrap(base, "periodic", **{"allow_requantize": True, **overrides})


def folded(name, num_folds=1, **overrides):
    """A model that was trained and folded, with rotations again on top."""
    model = wrap_to_fold(quantized_llama(name), **overrides).train()
    optimizer = adamw(model)
    for _ in range(num_folds):
        train(model, 1, optimizer)
        merge_and_reinitialize(model, optimizer)
    train(model, 1, optimizer)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The directory of a folded model, by format. Not to be changed: `edited` gives copies."""

    @functools.cache
    def save(name):
        directory = tmp_path_factory.mktemp("saved")
        folded(name).save_pretrained(directory)
        return directory

    return save


@pytest.fixture
def edited(saved, tmp_path):
    """The directory of a folded model of which a change has edited the tensors."""

    def edit(name, change):
        directory = Path(shutil.copytree(saved(name), tmp_path / "edited"))
        tensors = load_file(file_of(directory))
        change(tensors)
        save_file(tensors, file_of(directory), metadata={"format": "pt"})
        return directory

    return edit


def file_of(directory):
    return directory / "adapter_model.safetensors"


# What is refused


@for_every_library
def test_folds_need_permission(name):
    with pytest.raises(ValueError, match="'model.layers.0.self_attn.q_proj' is quantized .* allow_requantize=True"):
        wrap_to_fold(quantized_llama(name), allow_requantize=False)


@for_every_library
def test_initial_weights_are_not_drawn(name):
    with pytest.raises(ValueError, match="is quantized .* base_init='normalized' .* load the base unquantized"):
        wrap_to_fold(quantized_llama(name), base_init="normalized")


@for_every_library
def test_initial_weights_are_not_kept(name):
    with pytest.raises(ValueError, match="is quantized .* keep_initial_weights=True .* separate copy"):
        wrap_to_fold(quantized_llama(name), keep_initial_weights=True)


def test_weights_that_are_quantized_in_every_forward_are_refused():
    base = quantized_llama("int8")
    base.model.layers[1].mlp.up_proj.state.has_fp16_weights = True
    with pytest.raises(ValueError, match="'model.layers.1.mlp.up_proj' keeps its weight in 16 bits"):
        wrap_to_fold(base)


@pytest.mark.parametrize(
    "config", [Float8WeightOnlyConfig(), Int8WeightOnlyConfig(granularity=PerGroup(32))], ids=["parts", "shape"]
)
def test_layer_that_would_come_out_in_another_format_is_refused(config):
    base = quantized_llama("torchao-int8")
    base.hf_quantizer.quantization_config.get_apply_tensor_subclass = lambda: config
    with pytest.raises(ValueError, match="'model.layers.0.self_attn.q_proj' cannot be quantized anew as it was"):
        wrap_to_fold(base)


@pytest.mark.parametrize("name", ["nf4", "nf4-double"])
def test_weight_of_a_bf16_model_is_read_with_all_digits_of_its_scales(name):
    """A scale that is rounded at every fold would drift."""
    model = wrap_to_fold(quantized_llama(name, torch.bfloat16))
    weight = rotated_layers(model)[FIRST].base_weight.read()
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())


def test_after_a_fold_the_quantized_base_is_gone():
    model = folded("nf4")
    with pytest.raises(RuntimeError, match="disable_adapter cannot give the original model"), model.disable_adapter():
        pass


# The fold


@for_every_format
def test_fold_keeps_the_format(name):
    model = wrap_to_fold(quantized_llama(name)).train()
    base_layer = rotated_layers(model)[FIRST].get_base_layer()
    weight, before = base_layer.weight, parts(model)
    merge_and_reinitialize(model, adamw(model))
    assert base_layer.weight is weight
    after = parts(model)
    kinds = {key: (part.dtype, part.shape) for key, part in before.items()}
    assert {key: (part.dtype, part.shape) for key, part in after.items()} == kinds
    assert not torch.equal(after[f"{FIRST}.{_values(before)}"], before[f"{FIRST}.{_values(before)}"])
    if hasattr(weight, "quant_state"):
        untouched = quantized_llama(name).model.layers[0].self_attn.q_proj.weight
        for attribute in ("quant_type", "blocksize", "dtype", "shape", "nested"):
            assert getattr(weight.quant_state, attribute) == getattr(untouched.quant_state, attribute)
        assert weight.bnb_quantized


def _values(tensors):
    return "weight" if f"{FIRST}.weight" in tensors else "weight.qdata"


@for_every_format
def test_report_has_the_error_that_requantizing_added(name):
    model = wrap_to_fold(quantized_llama(name)).train()
    exact = {}
    for key, layer in rotated_layers(model).items():
        R, P = layer.poet_R["default"], layer.poet_P["default"]
        exact[key] = _rotate(R, _rotate(P, dequantized(layer.get_base_layer()).T, transpose=True).T)
    fresh = {
        key: fresh_quantization_error(layer.get_base_layer(), exact[key])
        for key, layer in rotated_layers(model).items()
    }
    report = merge_and_reinitialize(model)
    errors = {
        key: relative_error(dequantized(layer.get_base_layer()), exact[key])
        for key, layer in rotated_layers(model).items()
    }
    assert report.requantization_error == pytest.approx(max(errors.values()), rel=1e-2)
    assert all(0 < errors[key] < 1.01 * fresh[key] for key in errors)


def _rotate(rotation, x, transpose=False):
    """`G x` for a matrix of columns, block by block, in fp64."""
    x = x.clone()
    start = 0
    for offsets in rotation().deltas():
        for offset in offsets.double():
            index = rotation.index[start : start + len(offset)].long()
            G = offset.detach() + torch.eye(len(offset), dtype=torch.float64)
            x[index] = (G.T if transpose else G) @ x[index]
            start += len(offset)
    return x


def test_report_of_a_plain_base_has_no_such_error():
    model = wrap(llama(), "periodic", allow_requantize=True)
    assert merge_and_reinitialize(model).requantization_error == 0.0


@for_every_library
def test_fold_changes_the_output_by_the_error_only(name):
    model = wrap_to_fold(quantized_llama(name)).train()
    before = logits(model)
    report = merge_and_reinitialize(model)
    assert relative_error(logits(model), before) < 4 * report.requantization_error
    assert report.relative_output_change < 2 * report.requantization_error


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_fold_of_the_identity_changes_no_value(name):
    model = wrap_to_fold(quantized_llama(name), init_weights=True)
    before = {key: dequantized(layer.get_base_layer()) + 0.0 for key, layer in rotated_layers(model).items()}
    assert merge_and_reinitialize(model).requantization_error == 0.0
    assert_same(
        {key: dequantized(layer.get_base_layer()) + 0.0 for key, layer in rotated_layers(model).items()}, before
    )


@for_every_library
def test_training_goes_on_after_folds(name):
    model = wrap_to_fold(quantized_llama(name), init_weights=True).train()
    optimizer = adamw(model)
    losses = []
    for _ in range(3):
        losses += [step(model, optimizer) for _ in range(4)]
        merge_and_reinitialize(model, optimizer)
    assert losses[-1] < 0.95 * losses[0]


@for_every_library
def test_fold_of_a_broken_rotation_changes_nothing(name):
    model = wrap_to_fold(quantized_llama(name))
    before = parts(model)
    with torch.no_grad():
        rotated_layers(model)[FIRST].poet_R["default"].weight[0] = torch.inf
    with pytest.raises(POETFoldError, match="NaN or infinite"):
        merge_and_reinitialize(model)
    assert_same(parts(model), before)


def test_compensation_leaves_quantized_weights_alone():
    model = wrap_to_fold(quantized_llama("torchao-int8", torch.bfloat16))
    merge_and_reinitialize(model)
    assert not [key for key in model.state_dict() if "poet_residual" in key]


# Files


@for_every_format
def test_file_brings_exactly_this_weight_back(name, tmp_path):
    save_and_compare(name, "default", tmp_path)


@for_every_library
def test_file_loads_with_little_memory(name, tmp_path):
    model = folded(name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized_llama(name), tmp_path, low_cpu_mem_usage=True)
    assert_same(parts(loaded), parts(model))
    assert torch.equal(logits(loaded), logits(model))


@for_every_library
@pytest.mark.parametrize("adapter_name", ["weight", "SCB"])
def test_adapter_may_be_called_like_a_part(name, adapter_name, tmp_path):
    save_and_compare(name, adapter_name, tmp_path)


def save_and_compare(name, adapter_name, tmp_path):
    model = wrap_to_fold(quantized_llama(name), adapter_name=adapter_name).train()
    optimizer = train(model, 1)
    merge_and_reinitialize(model, optimizer)
    train(model, 1, optimizer)
    model.save_pretrained(tmp_path)
    directory = tmp_path if adapter_name == "default" else tmp_path / adapter_name
    loaded = PeftModel.from_pretrained(quantized_llama(name), directory, adapter_name=adapter_name)
    assert_same(parts(loaded), parts(model))
    for mode in (True, False):
        assert torch.equal(logits(loaded.train(mode)), logits(model.train(mode)))


@for_every_library
def test_file_of_a_bf16_model(name, tmp_path):
    model = wrap_to_fold(quantized_llama(name, torch.bfloat16))
    merge_and_reinitialize(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized_llama(name, torch.bfloat16), tmp_path)
    assert_same(parts(loaded), parts(model))
    assert torch.equal(logits(loaded), logits(model))


@for_every_format
def test_file_that_is_saved_after_evaluation_is_the_same(name, tmp_path):
    model = folded(name)
    model.save_pretrained(tmp_path / "before")
    logits(model)
    model.save_pretrained(tmp_path / "after")
    assert_same(load_file(file_of(tmp_path / "after")), load_file(file_of(tmp_path / "before")))


@for_every_library
def test_file_that_is_saved_while_merged_holds_the_unmerged_weight(name, tmp_path):
    model = folded(name)
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    assert_same(load_file(file_of(tmp_path / "merged")), load_file(file_of(tmp_path / "before")))


@for_every_library
def test_file_with_everything_else_that_trains(name, tmp_path):
    model = wrap_to_fold(quantized_llama(name), train_rest=True, target_modules=["q_proj", "up_proj"]).train()
    optimizer = train(model, 1)
    merge_and_reinitialize(model, optimizer)
    train(model, 1, optimizer)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized_llama(name), tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))


@for_every_library
def test_file_loads_into_a_model_that_ran(name, tmp_path):
    """In 8 bits a forward moves the scales to another place; in 4 bits it must not repack."""
    model = folded(name)
    model.save_pretrained(tmp_path)
    other = wrap_to_fold(quantized_llama(name)).eval()
    logits(other)
    other.load_adapter(tmp_path, "default")
    assert torch.equal(logits(other), logits(model))


@for_every_library
def test_loader_of_transformers_does_not_pass_an_unfolded_base_off_as_the_model(name, saved):
    model = quantized_llama(name)
    if name.startswith(("nf4", "fp4")):
        with pytest.raises(AttributeError):  # of transformers itself
            model.load_adapter(saved(name))
        return
    model.load_adapter(saved(name))
    with pytest.raises(POETCheckpointError, match="'model.layers.0.self_attn.q_proj', which was not loaded with it"):
        logits(model)


@for_every_library
def test_configuration_of_a_file_starts_a_new_adapter(name, saved):
    model = get_peft_model(quantized_llama(name), POETConfig.from_pretrained(saved(name), inference_mode=False))
    merge_and_reinitialize(model)
    assert logits(model).isfinite().all()


class Tokens(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        input_ids = tokens(batch=1, seed=index)[0]
        return {"input_ids": input_ids, "labels": input_ids}


def trainer_of(model, directory):
    arguments = TrainingArguments(
        directory,
        per_device_train_batch_size=2,
        max_steps=6,
        save_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
    )
    return Trainer(model, arguments, train_dataset=Tokens(), callbacks=[POETCallback()])


@pytest.mark.parametrize("name", ["nf4-double", "int8"])
def test_resumed_run_ends_bit_equal(name, tmp_path):
    model = wrap_to_fold(quantized_llama(name), merge_interval=2)
    trainer_of(model, tmp_path).train()
    resumed = wrap_to_fold(quantized_llama(name), merge_interval=2, rotation_seed=5)
    trainer_of(resumed, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(parts(resumed), parts(model))
    assert torch.equal(logits(resumed.eval()), logits(model.eval()))


def test_log_has_the_error_of_each_fold(tmp_path):
    trainer = trainer_of(wrap_to_fold(quantized_llama("nf4"), merge_interval=2), tmp_path)
    trainer.train()
    errors = {
        entry["step"]: entry["poet/requantization_error"]
        for entry in trainer.state.log_history
        if "poet/requantization_error" in entry
    }
    assert errors.keys() == {2, 4, 6}
    assert all(0.01 < error < 0.2 for error in errors.values())


# HQQ is tested where it is installed; transformers itself does not load it onto a CPU


def hqq_llama():
    hqq = pytest.importorskip("hqq.core.quantize")
    base = llama(hidden_size=128, intermediate_size=192, attention_bias=True)
    for layer in base.model.layers:
        for name, linear in list(layer.self_attn.named_children()):
            settings = hqq.BaseQuantizeConfig(nbits=4, group_size=64)
            setattr(layer.self_attn, name, hqq.HQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu"))
    return base


def test_hqq(tmp_path):
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    base = hqq_llama()
    assert torch.equal(logits(wrap(hqq_llama(), init_weights=True, target_modules=targets)), logits(base))

    model = wrap_to_fold(hqq_llama(), target_modules=targets)
    before, expected = parts(model), logits(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert_same(parts(model), before)
    assert torch.equal(logits(model), expected)

    optimizer = train(model, 1)
    assert 0 < merge_and_reinitialize(model, optimizer).requantization_error < 0.2
    train(model, 1, optimizer)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(hqq_llama(), tmp_path)
    assert_same(parts(loaded), parts(model))
    assert torch.equal(logits(loaded), logits(model))


# Files that do not fit: nothing of them is loaded


def refused(base_name, directory, match):
    model = wrap_to_fold(quantized_llama(base_name))
    before = state(model) if "torchao" not in base_name else None
    kept = parts(model)
    with pytest.raises(POETCheckpointError, match=match):
        model.load_adapter(directory, "default")
    assert_same(parts(model), kept)
    if before is not None:
        assert_same(state(model), before)


@for_every_library
def test_file_without_a_part_is_refused(name, edited):
    model = wrap_to_fold(quantized_llama(name))
    names = sorted(key.removeprefix(FIRST) for key in parts(model) if key.startswith(FIRST))
    directory = edited(name, lambda tensors: tensors.pop(f"{FIRST}.base_layer{names[-1]}"))
    refused(name, directory, f"lacks base weights.*{names[-1]}")


@pytest.mark.parametrize(
    ("of_file", "of_model", "match"),
    [
        ("nf4", "fp4", "quantized otherwise than the model's: .*quant_map"),
        ("nf4", "nf4-double", "lacks base weights.*nested_absmax"),
        ("nf4-double", "nf4", "do not belong into it.*nested_absmax"),
        ("nf4-stored-as-bf16", "nf4", "shape"),
        ("int8", "nf4", "lacks base weights.*absmax"),
        ("nf4", "int8", "lacks base weights.*SCB"),
        ("torchao-int8", "int8", "lacks base weights.*SCB"),
        ("int8", "torchao-int8", "lacks base weights.*qdata"),
    ],
)
def test_file_of_another_format_is_refused(of_file, of_model, match, saved):
    refused(of_model, saved(of_file), match)


@for_every_library
def test_file_of_a_plain_base_is_refused(name, tmp_path):
    plain = {"hidden_size": 128, "intermediate_size": 192, "attention_bias": True, "mlp_bias": True}
    wrap(llama(**plain), "periodic", allow_requantize=True).save_pretrained(tmp_path)
    refused(name, tmp_path, "lacks base weights")


@for_every_library
def test_plain_base_refuses_the_file(name, saved):
    plain = {"hidden_size": 128, "intermediate_size": 192, "attention_bias": True, "mlp_bias": True}
    with pytest.raises(POETCheckpointError, match="Nothing was loaded"):
        PeftModel.from_pretrained(llama(**plain), saved(name))


def test_packed_values_of_another_dtype_are_refused(edited):
    name, key = "nf4-stored-as-bf16", f"{FIRST}.base_layer.weight"
    directory = edited(name, lambda tensors: tensors.update({key: tensors[key].view(torch.float16)}))
    refused(name, directory, "quantized weights of another dtype: .*float16")


@for_every_library
def test_file_does_not_change_a_weight_that_another_adapter_stands_on(name, saved):
    model = wrap_to_fold(quantized_llama(name))
    kept = parts(model)
    with pytest.raises(POETCheckpointError, match="differs from the model's, on which the adapters .'default'. are"):
        model.load_adapter(saved(name), "second")
    assert_same(parts(model), kept)


@pytest.mark.parametrize("name", ["nf4", "nf4-stored-as-bf16"])
def test_unfolded_file_loads_beside_another_adapter(name, tmp_path):
    model = wrap_to_fold(quantized_llama(name))
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "second")
    expected = logits(model)
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)
    assert poet_config("periodic").merge_interval == model.peft_config["second"].merge_interval
