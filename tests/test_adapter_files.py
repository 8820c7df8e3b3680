"""What an adapter's two files hold: rotations, index tensors, and the configuration that made them."""

import dataclasses
import json
from collections import Counter

import pytest
from models import ADAPTERS, llama, poet_config, wrap
from peft import PeftConfig
from safetensors.torch import load_file

from poet_peft import POETConfig
from poet_peft.layer import poet_layers


@pytest.mark.parametrize("regime", ADAPTERS)
def test_the_file_holds_rotations_indexes_and_a_state_of_72_bytes(regime, tmp_path):
    model = wrap(llama(), regime)
    model.save_pretrained(tmp_path)
    held = Counter()
    for tensor in load_file(tmp_path / "adapter_model.safetensors").values():
        held[str(tensor.dtype)] += tensor.numel() * tensor.element_size()
    layers = [layer for _, layer in poet_layers(model)]
    indexes = sum(rotation.index.numel() for layer in layers for rotation in layer.rotations("default"))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert held == {"torch.float32": 4 * trained, "torch.int32": 4 * indexes, "torch.int64": 72 * len(layers)}


def test_the_configuration_file_holds_every_setting(tmp_path):
    config = poet_config(
        "periodic",
        num_neumann_terms=5,
        reinit_interval=8,
        memory_efficient=True,
        seed=9,
        target_modules=["q_proj", "up_proj"],
        layers_to_transform=[0],
        block_size_pattern={"up_proj": 8},
    )
    expected = {field.name: getattr(config, field.name) for field in dataclasses.fields(POETConfig)}
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "POET"
    own = expected.keys() - {field.name for field in dataclasses.fields(PeftConfig)}
    assert {"variant", "block_size", "merge_interval", "compensated_folds"} < own
    assert {name: set(saved[name]) if name == "target_modules" else saved[name] for name in own} == {
        name: expected[name] for name in own
    }
