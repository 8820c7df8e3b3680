"""POET inside axolotl, LLaMA-Factory and lm-eval: with the real packages where they can be imported, else with stubs
of the signatures that POET meets."""

import importlib
import json
import subprocess
import sys
import types
from collections import defaultdict
from importlib.util import find_spec

import pytest
import torch
from models import llama, tokenizer, tokens, train, wrap

from poet_peft import POETCallback, POETConfig, RotationMuon


class Settings(dict):
    """axolotl's configuration: a missing key is None."""

    __getattr__ = dict.get


def stub_of_axolotl():
    """`axolotl.integrations.base` of axolotl 0.19."""

    class BasePlugin:
        pass

    class AdapterCapabilities:
        def __init__(self, name, lora_like=False, relora=False):
            self.name, self.lora_like, self.relora = name, lora_like, relora

    return {"axolotl.integrations.base": {"BasePlugin": BasePlugin, "AdapterCapabilities": AdapterCapabilities}}


def stub_of_llamafactory():
    """The plugins of `llamafactory.v1` 0.9.5, with one table of names for all kinds."""

    class Plugin:
        table = defaultdict(dict)

        def __init__(self, name):
            self.name = name

        def register(self, method="__call__"):
            def decorator(function):
                self.table[self.name][method] = function
                return function

            return decorator

        def __call__(self, *args, **kwargs):
            return self.table[self.name]["__call__"](*args, **kwargs)

    plugins = "llamafactory.v1.plugins"
    return {
        f"{plugins}.model_plugins.peft": {"PeftPlugin": type("PeftPlugin", (Plugin,), {})},
        f"{plugins}.trainer_plugins.optimizer": {"OptimizerPlugin": type("OptimizerPlugin", (Plugin,), {})},
    }


def install(monkeypatch, package, stubs):
    """Put stubs where a package that is not installed would be."""
    if find_spec(package):
        return
    for name, attributes in stubs.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if path not in sys.modules:
                monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        vars(sys.modules[name]).update(attributes)


@pytest.fixture
def axolotl(monkeypatch):
    install(monkeypatch, "axolotl", stub_of_axolotl())
    monkeypatch.delitem(sys.modules, "poet_peft.integrations.axolotl", raising=False)
    return importlib.import_module("poet_peft.integrations.axolotl")


@pytest.fixture
def llamafactory(monkeypatch):
    install(monkeypatch, "llamafactory", stub_of_llamafactory())
    integration = importlib.import_module("poet_peft.integrations.llamafactory")
    integration.register()
    return integration


def poet_settings(**more):
    return Settings(adapter="poet", poet={"block_size": 16, "target_modules": "all-linear"}, **more)


def test_axolotl_loads_a_model_with_the_settings_of_the_configuration(axolotl):
    model, config = axolotl.POETPlugin().load_adapter(llama(), poet_settings())
    assert isinstance(config, POETConfig)
    assert model.peft_config["default"].block_size == 16


def test_axolotl_gets_the_configuration_without_a_model(axolotl):
    model, config = axolotl.POETPlugin().load_adapter(None, poet_settings(), config_only=True)
    assert model is None
    assert config.block_size == 16


def test_axolotl_goes_on_from_a_saved_adapter(axolotl, tmp_path):
    trained = wrap(llama(), "block_stochastic")
    trained.save_pretrained(tmp_path)
    model, _ = axolotl.POETPlugin().load_adapter(llama(), poet_settings(lora_model_dir=str(tmp_path)))
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, trained(tokens()).logits)
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_axolotl_keeps_other_adapters_to_itself(axolotl):
    assert axolotl.POETPlugin().load_adapter(llama(), Settings(adapter="lora")) is None
    assert axolotl.POETPlugin().add_callbacks_post_trainer(Settings(adapter="lora"), None) == []


def test_axolotl_trains_rotations_at_their_own_rate(axolotl, tmp_path):
    from transformers import Trainer, TrainingArguments

    settings = poet_settings(poet_lr=0.02, poet_optimizer="rotation_muon")
    plugin = axolotl.POETPlugin()
    model, _ = plugin.load_adapter(llama(), settings)
    arguments = TrainingArguments(tmp_path, learning_rate=0.5, max_steps=1, report_to="none", use_cpu=True)
    data = [{"input_ids": row, "labels": row} for row in tokens(batch=8)]
    trainer = Trainer(model, arguments, train_dataset=data)
    plugin.post_trainer_create(settings, trainer)
    [trainer.add_callback(callback) for callback in plugin.add_callbacks_post_trainer(settings, trainer)]
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(optimizer, RotationMuon)
    assert {group["initial_lr"] for group in optimizer.param_groups} == {0.02}
    assert any(isinstance(callback, POETCallback) for callback in trainer.callback_handler.callbacks)


def test_axolotl_s_own_trainer_can_make_the_optimizer(axolotl):
    trainer = types.SimpleNamespace(args=types.SimpleNamespace(learning_rate=1e-3, weight_decay=0.0))
    axolotl.POETPlugin().post_trainer_create(poet_settings(), trainer)
    factory, keywords = trainer.optimizer_cls_and_kwargs
    optimizer = factory()(wrap(llama(), "block_stochastic"), trainer.args, **keywords)
    assert isinstance(optimizer, torch.optim.AdamW)


def test_axolotl_finds_the_names_that_the_plugin_adds(axolotl):
    module, _, name = axolotl.POETPlugin().get_input_args().rpartition(".")
    arguments = getattr(importlib.import_module(module), name)
    assert arguments(poet={"block_size": 8}, poet_lr=1e-3).poet_lr == 1e-3
    assert [capability.name for capability in axolotl.POETPlugin().get_adapter_capabilities()] == ["poet"]


def test_real_axolotl_takes_the_plugin():
    if not find_spec("axolotl"):
        pytest.skip("axolotl is not installed; it pins another version of PEFT")
    from axolotl.integrations.base import PluginManager

    manager = PluginManager.get_instance()
    manager.register("poet_peft.integrations.axolotl.POETPlugin")
    assert manager.supports_adapter("poet")
    manager.cfg = poet_settings()
    model, config = manager.load_adapter(llama(), manager.cfg)
    assert config.block_size == 16 and model.peft_config["default"] is config


def plugins():
    return (
        importlib.import_module("llamafactory.v1.plugins.model_plugins.peft").PeftPlugin,
        importlib.import_module("llamafactory.v1.plugins.trainer_plugins.optimizer").OptimizerPlugin,
    )


def test_llamafactory_makes_model_and_optimizer_by_name(llamafactory):
    PeftPlugin, OptimizerPlugin = plugins()
    model = PeftPlugin("poet")(llama(), {"name": "poet", "block_size": 16}, True)
    optimizer = OptimizerPlugin("poet_optimizer")(model, {"name": "poet_optimizer", "poet_lr": "2e-3"})
    assert model.peft_config["default"].block_size == 16
    assert {group["lr"] for group in optimizer.param_groups} == {2e-3}


def test_llamafactory_loads_an_adapter_for_inference(llamafactory, tmp_path):
    wrap(llama(), "block_stochastic").save_pretrained(tmp_path)
    model = llamafactory.wrap_model(llama(), {"name": "poet", "adapter_name_or_path": [str(tmp_path)]})
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_llamafactory_does_not_start_an_adapter_in_inference(llamafactory):
    with pytest.raises(ValueError, match="set adapter_name_or_path"):
        llamafactory.wrap_model(llama(), {"name": "poet"})


@pytest.mark.parametrize(
    ("config", "message"),
    [({}, "no poet_lr"), ({"poet_lr": 1, "rate": 1}, "rate is unknown"), ({"optimizer": "sgd"}, "'sgd' is unknown")],
)
def test_llamafactory_s_optimizer_names_what_is_wrong(llamafactory, config, message):
    with pytest.raises(ValueError, match=message):
        llamafactory.make_optimizer(wrap(llama(), "block_stochastic"), config)


@pytest.mark.slow
def test_lm_eval_evaluates_a_poet_adapter(tmp_path):
    if not find_spec("lm_eval"):
        pytest.skip("lm_eval is not installed")
    words = tokenizer()
    base = llama()
    base.save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    trained = wrap(llama(), "block_stochastic")
    train(trained, num_steps=2)
    trained.save_pretrained(tmp_path / "adapter")
    # Which of two words follows: where the adapter and the base model disagree, the adapter is right.
    vocabulary = sorted(words.get_vocab(), key=words.get_vocab().get)[:10]
    rows = []
    for first in vocabulary:
        with torch.no_grad():
            pair = [model.eval()(**words(first, return_tensors="pt")).logits[0, -1, :2] for model in (base, trained)]
        before, after = (int(logits.argmax()) for logits in pair)
        if before != after:
            rows.append({"context": first, "choices": vocabulary[:2], "label": after})
    assert rows
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "words.yaml").write_text(
        "task: words\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'words.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: context\ndoc_to_choice: choices\n"
        "doc_to_target: label\nmetric_list: [{metric: acc}]\n"
    )
    command = [sys.executable, "-m", "poet_peft.integrations.lm_eval", "run", "--model", "hf", "--model_args",
               f"pretrained={tmp_path / 'base'},peft={tmp_path / 'adapter'}", "--tasks", "words",
               "--include_path", str(tmp_path), "--device", "cpu", "--output_path", str(tmp_path / "out")]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["words"]["acc,none"] == 1.0
