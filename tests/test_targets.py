"""What PEFT's choice of layers leaves out: output heads, and layers whose weight another module reads itself."""

import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from cases import randomize
from models import bert_classifier, llama_classifier, tokens
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from poet_peft import POETConfig, poet_param_groups
from poet_peft.experts import ParamWrapper
from poet_peft.layer import POETLayer
from poet_peft.uncalled import reader_of


pytestmark = [
    pytest.mark.filterwarnings("ignore:The block size is larger than the side"),
    pytest.mark.filterwarnings("ignore:.*leaves out"),
]

SIZES = {"vocab_size": 128, "hidden_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
ENCODER = {**SIZES, "intermediate_size": 80, "num_attention_heads": 4, "num_labels": 3}
DECODER = {**ENCODER, "num_key_value_heads": 2}
SPEECH = {**ENCODER, "conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_feat_extract_layers": 2}
SPEECH |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0}
SPEECH |= {"apply_spec_augment": False}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_d_state": 4, "mamba_n_groups": 1}


def build(kind: str, model_type: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A tiny model with random weights: `kind` is its class."""
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(seed)
    return getattr(transformers, kind)(config).eval()


def poet(model: nn.Module, **settings: Any) -> PeftModel:
    return get_peft_model(model, POETConfig(**{"target_modules": "all-linear", "block_size": 2, **settings}))


def rotated(model: nn.Module) -> set[str]:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = base.named_modules()
    return {name for name, module in modules if isinstance(module, POETLayer) and not isinstance(module, ParamWrapper)}


def linear(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def warnings_of(wrap: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        wrap()
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    return [message for message in messages if "leaves out" in message]


def causal() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "labels": tokens()}


def speech() -> dict[str, Tensor]:
    samples = torch.randn(2, 400, generator=torch.Generator().manual_seed(1))
    return {"input_values": samples, "labels": torch.tensor([0, 1])}


def documents() -> dict[str, Tensor]:
    boxes = torch.zeros(2, 12, 4, dtype=torch.long)
    return {"input_ids": tokens(), "bbox": boxes, "labels": torch.zeros(2, 12, dtype=torch.long)}


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits.clone()


def train(model: nn.Module, batch: dict[str, Tensor], num_steps: int = 2) -> None:
    optimizer = torch.optim.AdamW(poet_param_groups(model, lr=1e-2, poet_lr=1e-2))
    for _ in range(num_steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# Layers that are not called


class Bypassing(NamedTuple):
    """A model in which a module reads the weight of layers itself."""

    kind: str
    model_type: str
    settings: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]]
    reader: str
    layers: list[str]  # with * for an index


MIXER = "backbone.layers.*.mixer"
ATTENTION = "wavlm.encoder.layers.*.attention"
STATE_SPACE = {**SIZES, "state_size": 4, "time_step_rank": 4}
BYPASSING = {
    "mamba": Bypassing("MambaForCausalLM", "mamba", STATE_SPACE, causal, "MambaMixer",
                       [f"{MIXER}.x_proj", f"{MIXER}.dt_proj", f"{MIXER}.out_proj"]),
    "falcon-mamba": Bypassing("FalconMambaForCausalLM", "falcon_mamba", STATE_SPACE, causal, "FalconMambaMixer",
                              [f"{MIXER}.x_proj", f"{MIXER}.dt_proj", f"{MIXER}.out_proj"]),
    "mamba2": Bypassing("Mamba2ForCausalLM", "mamba2",
                        {**SIZES, "state_size": 4, "num_heads": 4, "head_dim": 24, "n_groups": 1},
                        causal, "Mamba2Mixer", [f"{MIXER}.out_proj"]),
    "jamba": Bypassing("JambaForCausalLM", "jamba",
                       {**DECODER, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
                        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4},
                       causal, "JambaMambaMixer", ["model.layers.*.mamba.dt_proj"]),
    "bamba": Bypassing("BambaForCausalLM", "bamba", {**DECODER, **MAMBA2, "attn_layer_indices": [1]},
                       causal, "BambaMixer", ["model.layers.*.mamba.out_proj"]),
    "zamba2": Bypassing("Zamba2ForCausalLM", "zamba2",
                        {**ENCODER, "num_hidden_layers": 3, "mamba_d_state": 4, "n_mamba_heads": 4,
                         "mamba_headdim": 24, "mamba_ngroups": 1, "num_mem_blocks": 1,
                         "layers_block_type": ["mamba", "hybrid", "mamba"]},
                        causal, "Zamba2MambaMixer",
                        ["model.layers.*.mamba.out_proj", "model.layers.*.mamba_decoder.mamba.out_proj"]),
    "falcon-h1": Bypassing("FalconH1ForCausalLM", "falcon_h1",
                           {**DECODER, **MAMBA2, "mamba_d_ssm": 96, "head_dim": 12},
                           causal, "FalconH1Mixer", ["model.layers.*.mamba.out_proj"]),
    "granite-hybrid": Bypassing("GraniteMoeHybridForCausalLM", "granitemoehybrid",
                                {**DECODER, **MAMBA2, "layer_types": ["mamba", "attention"], "num_local_experts": 2,
                                 "num_experts_per_tok": 1, "shared_intermediate_size": 16},
                                causal, "GraniteMoeHybridMambaLayer", ["model.layers.*.mamba.out_proj"]),
    "nemotron-h": Bypassing("NemotronHForCausalLM", "nemotron_h",
                            {"vocab_size": 128, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4,
                             "num_key_value_heads": 2, "head_dim": 12, "mamba_num_heads": 4, "mamba_head_dim": 24,
                             "ssm_state_size": 4, "n_groups": 1, "layers_block_type": ["mamba", "attention", "mlp"]},
                            causal, "NemotronHMamba2Mixer", ["model.layers.*.mixer.out_proj"]),
    "wavlm": Bypassing("WavLMForSequenceClassification", "wavlm", SPEECH, speech, "WavLMAttention",
                       [f"{ATTENTION}.{name}" for name in ("k_proj", "v_proj", "q_proj", "out_proj")]),
    "x-vector": Bypassing("Wav2Vec2ForXVector", "wav2vec2",
                          {**SPEECH, "tdnn_dim": (16, 16, 32), "tdnn_kernel": (3, 2, 1), "tdnn_dilation": (1, 1, 1),
                           "xvector_output_dim": 16},
                          speech, "TDNNLayer", ["tdnn.*.kernel"]),
    "layoutlm": Bypassing("LayoutLMv3ForTokenClassification", "layoutlmv3",
                          {**ENCODER, "visual_embed": False, "coordinate_size": 8, "shape_size": 8},
                          documents, "LayoutLMv3Encoder",
                          [f"layoutlmv3.encoder.rel_pos_{name}bias" for name in ("", "x_", "y_")]),
    "mobilebert": Bypassing("MobileBertForMaskedLM", "mobilebert",
                            {**ENCODER, "embedding_size": 16, "intra_bottleneck_size": 48,
                             "num_feedforward_networks": 1},
                            causal, "MobileBertLMPredictionHead", ["cls.predictions.dense"]),
    "gemma3n": Bypassing("Gemma3nForCausalLM", "gemma3n_text",
                         {**DECODER, "intermediate_size": [80, 80], "vocab_size_per_layer_input": 128,
                          "hidden_size_per_layer_input": 8, "head_dim": 12, "laurel_rank": 4,
                          "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0],
                          "layer_types": ["sliding_attention", "full_attention"]},
                         causal, "Gemma3nTextAltUp",
                         [f"model.layers.*.altup.{name}_coefs" for name in ("correction", "prediction")]),
    "reformer": Bypassing("ReformerModelWithLMHead", "reformer",
                          {"vocab_size": 128, "hidden_size": 32, "attn_layers": ["lsh", "lsh"], "is_decoder": True,
                           "num_attention_heads": 2, "attention_head_size": 16, "feed_forward_size": 32,
                           "axial_pos_embds": False, "max_position_embeddings": 64, "lsh_attn_chunk_length": 4,
                           "local_attn_chunk_length": 4, "num_buckets": 2, "hash_seed": 0},
                          causal, "LSHSelfAttention",
                          [f"reformer.encoder.layers.*.attention.self_attention.{n}" for n in ("query_key", "value")]),
}  # fmt: skip
for_bypassing = pytest.mark.parametrize("name", BYPASSING)


def bypassing(name: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    case = BYPASSING[name]
    return build(case.kind, case.model_type, seed, **{**case.settings, **settings})


def without_index(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)


@for_bypassing
def test_all_linear_leaves_out_what_is_not_called(name):
    base = bypassing(name)
    head = base.get_output_embeddings()
    others = {n for n in linear(base) if base.get_submodule(n) is not head and without_index(n) not in
              BYPASSING[name].layers} - {"classifier"}  # fmt: skip
    assert rotated(poet(base)) == others | ({"classifier"} if name == "x-vector" else set())


@for_bypassing
def test_one_warning_names_what_is_not_called_and_its_reader(name):
    messages = warnings_of(lambda: poet(bypassing(name)))
    (message,) = [message for message in messages if "whose rotations would not train" in message]
    layers = ", ".join(BYPASSING[name].layers)
    assert f"{BYPASSING[name].reader} computes with the weight of {layers} and does not call" in message


@pytest.mark.parametrize("name", [n for n in BYPASSING if n not in ("reformer", "gemma3n")])
def test_every_rotation_of_all_linear_trains(name):
    """Reformer's and Gemma 3n's frozen or zero weights stop gradients."""
    model = poet(bypassing(name), init_weights=False).train()
    model(**BYPASSING[name].inputs()).loss.backward()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in trainable.items() if p.grad is None or not p.grad.any()} == set()


@for_bypassing
def test_target_that_is_not_called_is_refused(name):
    base, layers = bypassing(name), BYPASSING[name].layers
    targets = [layer.rpartition(".")[2] for layer in layers]
    with pytest.raises(ValueError, match="cannot rotate what is not called") as caught:
        poet(base, target_modules=targets, base_init="normalized")
    assert f"{BYPASSING[name].reader} computes with the weight of" in str(caught.value)
    assert all(layer in str(caught.value) for layer in layers)
    assert f"exclude_modules: {sorted(set(targets))}" in str(caught.value)
    assert rotated(base) == set()
    fresh = bypassing(name).state_dict()
    assert all(torch.equal(tensor, fresh[key]) for key, tensor in base.state_dict().items())


def test_remedy_of_a_refused_target_works():
    model = poet(bypassing("mamba"), target_modules=["in_proj", "dt_proj"], exclude_modules=["dt_proj"])
    assert rotated(model) == {f"backbone.layers.{i}.mixer.in_proj" for i in range(2)}


def test_merged_model_computes_the_same():
    model = poet(bypassing("mamba"))
    randomize(model, theta=0.4)
    expected = logits(model, causal())
    assert (logits(bypassing("mamba"), causal()) - expected).norm() > 1e-3 * expected.norm()
    torch.testing.assert_close(logits(model.merge_and_unload(), causal()), expected, rtol=1e-5, atol=1e-6)


def test_base_init_leaves_alone_what_is_not_called():
    base, fresh = poet(bypassing("mamba"), base_init="normalized").get_base_model(), bypassing("mamba")
    for child in ("dt_proj", "x_proj", "out_proj"):
        layer = f"backbone.layers.0.mixer.{child}"
        assert torch.equal(base.get_submodule(layer).weight, fresh.get_submodule(layer).weight)


def test_train_rest_trains_and_saves_what_is_not_called(tmp_path):
    model = get_peft_model(bypassing("mamba"), POETConfig.for_pretraining(block_size=2))
    layer = model.get_base_model().backbone.layers[0].mixer.dt_proj
    before = layer.weight.detach().clone()
    train(model, causal())
    assert not torch.equal(layer.weight, before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bypassing("mamba", seed=1), tmp_path).eval()
    assert torch.equal(logits(loaded, causal()), logits(model.eval(), causal()))


@pytest.mark.parametrize("name", ["mamba", "jamba", "wavlm", "x-vector"])
def test_saved_adapter_is_loaded_into_the_same_layers(name, tmp_path):
    model = poet(bypassing(name), init_weights=False)
    model.save_pretrained(tmp_path)

    def load():
        nonlocal loaded
        loaded = PeftModel.from_pretrained(bypassing(name), tmp_path)

    loaded = None
    assert warnings_of(load) == []
    assert rotated(loaded) == rotated(model)
    batch = BYPASSING[name].inputs()
    assert torch.equal(logits(loaded.eval(), batch), logits(model.eval(), batch))


@pytest.mark.parametrize("from_keys", [False, True], ids=["from-config", "from-keys"])
def test_injection_leaves_out_the_same_layers(from_keys):
    model = poet(bypassing("mamba"))
    keys = {f"{name}.poet_R.weight": torch.empty(0) for name in rotated(model)} if from_keys else None
    config = POETConfig(target_modules="all-linear", block_size=2)
    injected = inject_adapter_in_model(config, bypassing("mamba"), state_dict=keys)
    assert rotated(injected) == rotated(model)
    assert set(config.target_modules) == rotated(model)


def test_second_adapter_leaves_out_the_same_layers():
    model = poet(bypassing("mamba"))
    before = rotated(model)
    model.add_adapter("second", POETConfig(target_modules="all-linear", block_size=2))
    assert rotated(model) == before
    assert all("second" in m.poet_R for m in model.modules() if isinstance(m, POETLayer))


def test_defaults_leave_out_what_is_not_called(monkeypatch):
    from poet_peft.model import POETModel

    monkeypatch.setitem(POETModel.target_module_mapping, "mamba", ["in_proj", "out_proj"])
    model = poet(bypassing("mamba"), target_modules=None)
    assert rotated(model) == {f"backbone.layers.{i}.mixer.in_proj" for i in range(2)}


# Where a name is also the end of another


class ReadingItsLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out_proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.out_proj.weight.T


class Endings(nn.Module):
    """A layer that is called, and one inside of another module that has its name and is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = ReadingItsLayer()
        self.out_proj = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)


@pytest.mark.parametrize("exclude", [None, ["other"], "oth.*"], ids=["none", "names", "expression"])
def test_layer_is_not_taken_for_another_whose_name_it_ends(exclude, tmp_path):
    model = poet(Endings(), exclude_modules=exclude)
    expected = {"out_proj", "other"} if exclude is None else {"out_proj"}
    assert rotated(model) == expected
    model.save_pretrained(tmp_path)
    assert rotated(PeftModel.from_pretrained(Endings(), tmp_path)) == expected


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        (None, {"attention.out_proj"}),
        (["other"], {"other", "attention.out_proj"}),
        ("oth.*", r"(?:oth.*)|attention\.out_proj"),
    ],
)
def test_what_the_user_excludes_stays_excluded(exclude, expected):
    assert poet(Endings(), exclude_modules=exclude).peft_config["default"].exclude_modules == expected


# What counts as reading a weight


class Reading(nn.Module):
    """Reads in every way that counts, and in none that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.aliased, self.in_method, self.inspected, self.drawn, self.called = (
            nn.Linear(8, 8) for _ in range(6)
        )
        self.listed = nn.ModuleList([nn.Linear(8, 8)])
        self.inner = nn.Sequential(nn.Linear(8, 8))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.drawn.weight)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.inspected.weight, Tensor) and self.inspected.weight is not None:
            x = x.to(self.inspected.weight.dtype)
        weight = self.aliased.weight
        x = self.drawn(self.inspected(self.called(x @ self.read.weight @ weight)))
        return self.method(sum(x @ self.listed[i].weight for i in range(1)) @ self.inner[0].weight)

    def method(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.in_method.weight, self.called.bias)


class Inheriting(Reading):
    pass


class Extending(Reading):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Overriding(Reading):
    def forward(self, x: Tensor) -> Tensor:
        return self.read(x)


class Holding(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([module])


def read_layers(model: nn.Module) -> set[str]:
    return {name for name in linear(model) if reader_of(model, name) is not None}


@pytest.mark.parametrize("cls", [Reading, Inheriting, Extending])
def test_layers_are_found_whose_weight_a_module_computes_with(cls):
    assert read_layers(cls()) == {"read", "aliased", "in_method", "listed.0", "inner.0"}


def test_forward_that_is_overridden_does_not_count():
    assert read_layers(Overriding()) == {"in_method"}


def test_reader_is_the_module_that_holds_the_layer():
    model = Holding(Reading())
    assert reader_of(model, "blocks.0.read") is model.blocks[0]


def test_module_without_source_is_taken_to_call_its_layers():
    namespace = {"nn": nn}
    exec("class Unknown(nn.Module):\n    def forward(self, x):\n        return x @ self.layer.weight", namespace)
    model = namespace["Unknown"]()
    model.layer = nn.Linear(8, 8)
    assert read_layers(model) == set()


BLOOM = {"vocab_size": 128, "hidden_size": 48, "n_layer": 2, "n_head": 4}


def test_layers_of_bloom_that_are_called_are_rotated():
    assert len(rotated(poet(build("BloomForCausalLM", "bloom", **BLOOM)))) == 8


def test_layers_of_bloom_that_are_computed_in_slices_are_left_out():
    base = build("BloomForCausalLM", "bloom", **BLOOM, pretraining_tp=2, slow_but_exact=True)
    expected = {name for name in linear(base) if name.endswith((".query_key_value", ".dense_h_to_4h"))}
    assert rotated(poet(base)) == expected


def test_default_targets_of_deberta_are_rotated():
    base = build("DebertaForSequenceClassification", "deberta", **ENCODER)
    names = {f"deberta.encoder.layer.{i}.attention.self.in_proj" for i in range(2)}
    assert rotated(poet(base, target_modules=None)) == names
    assert warnings_of(lambda: poet(build("DebertaForMaskedLM", "deberta", **ENCODER), target_modules=None)) == []


# Output heads


class Head(NamedTuple):
    """A model whose head is not an output embedding."""

    kind: str
    model_type: str
    head: str
    task: str | None = None
    settings: dict[str, Any] = ENCODER


IMAGES = {**{k: v for k, v in ENCODER.items() if "vocab" not in k and "pad" not in k}, "image_size": 16}
BART = {"vocab_size": 128, "d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "num_labels": 3}
BART |= {
    f"{side}_{size}": n for side in ("encoder", "decoder") for size, n in (("attention_heads", 4), ("ffn_dim", 8))
}
HEADS = {
    "bert": Head("BertForSequenceClassification", "bert", "classifier", "SEQ_CLS"),
    "deberta": Head("DebertaForSequenceClassification", "deberta", "classifier", "SEQ_CLS"),
    "deberta-v2": Head("DebertaV2ForSequenceClassification", "deberta-v2", "classifier", "SEQ_CLS"),
    "roberta": Head("RobertaForSequenceClassification", "roberta", "classifier.out_proj", "SEQ_CLS"),
    "distilbert": Head("DistilBertForSequenceClassification", "distilbert", "classifier", "SEQ_CLS",
                       {"vocab_size": 128, "dim": 48, "hidden_dim": 80, "n_layers": 2, "n_heads": 4, "num_labels": 3}),
    "llama": Head("LlamaForSequenceClassification", "llama", "score", "SEQ_CLS", DECODER),
    "bart": Head("BartForSequenceClassification", "bart", "classification_head.out_proj", None, BART),
    "tokens": Head("BertForTokenClassification", "bert", "classifier", "TOKEN_CLS"),
    "answers": Head("BertForQuestionAnswering", "bert", "qa_outputs", "QUESTION_ANS", {**ENCODER, "num_labels": 2}),
    "choices": Head("BertForMultipleChoice", "bert", "classifier"),
    "sentences": Head("BertForPreTraining", "bert", "cls.seq_relationship"),
    "vit": Head("ViTForImageClassification", "vit", "classifier", None, {**IMAGES, "patch_size": 8}),
    "speech": Head("Wav2Vec2ForSequenceClassification", "wav2vec2", "classifier", "SEQ_CLS", SPEECH),
    "ctc": Head("Wav2Vec2ForCTC", "wav2vec2", "lm_head", None, SPEECH),
}  # fmt: skip
for_heads = pytest.mark.parametrize("name", HEADS)


def with_head(name: str) -> PreTrainedModel:
    return build(HEADS[name].kind, HEADS[name].model_type, **HEADS[name].settings)


@for_heads
def test_all_linear_rotates_all_but_the_head(name):
    base = with_head(name)
    embedding = {n for n, module in base.named_modules() if module is base.get_output_embeddings()}
    expected = linear(base) - {HEADS[name].head} - embedding
    assert rotated(poet(base)) == expected


@for_heads
def test_warning_names_the_head_and_how_to_train_it(name):
    head, task = HEADS[name].head, HEADS[name].task
    (message,) = warnings_of(lambda: poet(with_head(name)))
    assert f"leaves out the output head, which is not trained: {head}." in message
    assert message.endswith(f"modules_to_save={[head]}" + (f", or task_type={task!r}." if task else "."))


@for_heads
def test_head_that_is_trained_as_the_warning_says_is_silent(name):
    model = None

    def wrap():
        nonlocal model
        model = poet(with_head(name), modules_to_save=[HEADS[name].head])

    assert warnings_of(wrap) == []
    assert isinstance(model.get_base_model().get_submodule(HEADS[name].head), ModulesToSaveWrapper)


@pytest.mark.parametrize("name", [name for name, head in HEADS.items() if head.task])
def test_task_leaves_the_head_to_peft_and_is_silent(name):
    model = None

    def wrap():
        nonlocal model
        model = poet(with_head(name), task_type=HEADS[name].task)

    assert warnings_of(wrap) == []
    top = HEADS[name].head.partition(".")[0]
    assert isinstance(model.get_base_model().get_submodule(top), ModulesToSaveWrapper)
    # PEFT takes DistilBERT's pre_classifier for a classifier too.
    assert rotated(model) == {n for n in linear(with_head(name)) if top not in (n.partition(".")[0], n[-len(top) :])}


def test_task_does_not_hide_a_head_that_peft_does_not_know():
    (message,) = warnings_of(lambda: poet(with_head("bart"), task_type="SEQ_CLS"))
    assert message.endswith("pass modules_to_save=['classification_head.out_proj'].")


@pytest.mark.parametrize(("base", "head"), [(bert_classifier, "classifier"), (llama_classifier, "score")])
def test_pretraining_trains_the_head_in_full_and_reloads_it(base, head, tmp_path):
    model = None

    def wrap():
        nonlocal model
        model = get_peft_model(base(), POETConfig.for_pretraining(block_size=2))

    assert warnings_of(wrap) == []
    layer = model.get_base_model().get_submodule(head)
    assert torch.equal(layer.weight, base().get_submodule(head).weight)
    batch = {"input_ids": tokens(), "labels": torch.tensor([0, 1])}
    train(model, batch)
    assert not torch.equal(layer.weight, base().get_submodule(head).weight)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(seed=1), tmp_path).eval()
    assert torch.equal(logits(loaded, batch), logits(model.eval(), batch))


def test_head_that_is_named_is_rotated():
    assert "classifier" in rotated(poet(bert_classifier(), target_modules=["query", "classifier"]))


@pytest.mark.parametrize("settings", [{"hidden_size": 48}, {"num_labels": 48}], ids=["usual", "as-wide-as-hidden"])
def test_model_without_a_head_is_rotated_everywhere(settings):
    base = build("BertModel", "bert", **{**ENCODER, **settings})
    expected = linear(base)
    assert rotated(poet(base)) == expected


# Layers that share their weight


def image_and_text():
    """A model with a head of its text part, which is tied to the embedding and which PEFT does not see."""
    sizes = {**ENCODER, "num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
    vision = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 4}
    parts = {"text_config": sizes, "vision_config": {**vision, "image_size": 16, "patch_size": 8}}
    return build("BlipForConditionalGeneration", "blip", **parts)


TIED = "text_decoder.cls.predictions.decoder"


def test_layer_that_shares_its_weight_is_left_out_by_name():
    model = image_and_text()
    others = linear(model) - {TIED}
    with pytest.warns(UserWarning, match=f"leaves out layers that share their weight.*: {TIED} .shared by"):
        model = poet(model)
    assert rotated(model) == others


def test_layer_that_shares_its_weight_and_trains_in_full_is_not_named():
    said = warnings_of(lambda: poet(image_and_text(), train_rest=True, merge_interval=4))
    assert not any("share their weight" in message for message in said)


# Subclasses of linear layers that are none


def with_router():
    """Its router is an `nn.Linear` that returns a choice of experts."""
    return build("PhimoeForCausalLM", "phimoe", **{**DECODER, "intermediate_size": 24, "num_local_experts": 4})


def test_router_that_is_a_linear_layer_by_class_only_is_left_out_by_name():
    model = with_router()
    routers = {name for name in linear(model) if name.endswith("router")}
    with pytest.warns(UserWarning, match=r"leaves out model.layers.\*.mlp.router of type PhimoeTopKRouter"):
        model = poet(model)
    assert len(routers) == 2
    assert not rotated(model) & routers
    model(**causal()).loss.backward()


def test_router_that_is_a_linear_layer_by_class_only_is_refused():
    with pytest.raises(TypeError, match="'model.layers.0.mlp.router' of type PhimoeTopKRouter, which returns"):
        poet(with_router(), target_modules=["router"])


class CalledFromAList(nn.Module):
    """As the heads of MaskFormer: the layers have names, and are called from a list."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = [nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)]
        for i, layer in enumerate(self.layers):
            self.add_module(str(i), layer)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_that_are_called_from_a_list_are_rotated_there():
    model = get_peft_model(CalledFromAList(), POETConfig(target_modules=["0", "2"], block_size=4))
    randomize(model, 0.5)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    rotated = model(x)
    rotated.square().sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        assert (model(x) - rotated).abs().max() > 0.05
    torch.testing.assert_close(model.merge_and_unload()(x), rotated)
