"""`adapter_names`, an adapter for every sample of a batch: equal to running the samples one by one."""

import pytest
import torch
from cases import TOLERANCE, for_few, inputs, randomize, relative_error, rotated
from models import bert_classifier, gpt2, llama, llama_classifier, poet_config, tokens, train, wrap
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from poet_peft import POETReferenceError, merge_and_reinitialize
from poet_peft.layer import poet_layers


NAMES = ["second", "__base__", "first", "second"]
GENERATION = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def t5():
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


def two_adapters(base):
    """A model of `first`, block-stochastic, and `second`, fully stochastic, in evaluation mode."""
    model = wrap(base, "block_stochastic", "first")
    model.add_adapter("second", poet_config("fully_stochastic"))
    randomize(model, 0.8)
    return model.eval()


def one_by_one(model, compute, names=NAMES, batch=None):
    """`compute(model, samples)` of every sample, with its adapter alone active."""
    results = []
    for name, sample in zip(names, tokens(len(names)) if batch is None else batch, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                results.append(compute(model, sample[None]))
        else:
            model.set_adapter(name)
            results.append(compute(model, sample[None]))
    model.set_adapter("first")
    return torch.cat(results)


def forward(model, input_ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=input_ids, **kwargs).logits


@pytest.mark.parametrize("base", [llama, gpt2, bert_classifier])
def test_mixed_batch_computes_what_the_samples_do_one_by_one(base):
    model = two_adapters(base())
    expected = one_by_one(model, forward)
    assert relative_error(forward(model, tokens(4), adapter_names=NAMES), expected) < 1e-5


def test_samples_of_different_adapters_differ():
    model = two_adapters(llama())
    same = tokens(1).expand(3, -1)
    outputs = forward(model, same, adapter_names=["first", "second", "__base__"])
    assert all(relative_error(outputs[i], outputs[j]) > 0.01 for i, j in ((0, 1), (0, 2), (1, 2)))


@for_few
def test_mixed_batch_of_one_layer(case):
    model, layer = rotated(case)
    x = inputs(case, 3)
    with torch.no_grad():
        expected = torch.cat([model(x[:1]), layer.get_base_layer()(x[1:2]), model(x[2:])])
        y = layer(x, adapter_names=["default", "__base__", "default"])
    assert y.dtype == expected.dtype
    assert relative_error(y, expected) < TOLERANCE[case.dtype]


def test_trained_heads_are_those_of_the_samples():
    model = wrap(llama_classifier(), task_type="SEQ_CLS", adapter_name="first")
    model.add_adapter("second", poet_config("fully_stochastic", task_type="SEQ_CLS"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.second" in name:
                parameter.neg_()
    model.eval()
    expected = one_by_one(model, forward)
    assert relative_error(forward(model, tokens(4), adapter_names=NAMES), expected) < 1e-5


def test_layers_without_the_adapter_are_the_base_layer():
    model = wrap(llama(), "block_stochastic", "first")
    model.add_adapter("second", poet_config("fully_stochastic", target_modules=["q_proj"]))
    expected = one_by_one(model.eval(), forward)
    assert relative_error(forward(model, tokens(4), adapter_names=NAMES), expected) < 1e-5


def test_scales_of_the_adapters_count():
    model = two_adapters(llama())
    for _, layer in poet_layers(model):
        layer.set_scale("first", 0.5)
        layer.set_scale("second", 0)
    expected = one_by_one(model, forward)
    assert relative_error(forward(model, tokens(4), adapter_names=NAMES), expected) < 1e-5


def generate(model, input_ids, **kwargs):
    return model.generate(input_ids=input_ids, **{**GENERATION, **kwargs})


@pytest.mark.parametrize("base", [llama, t5])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_is_that_of_the_samples_one_by_one(base, num_beams):
    model = two_adapters(base())
    expected = one_by_one(model, lambda model, x: generate(model, x, num_beams=num_beams))
    assert torch.equal(generate(model, tokens(4), num_beams=num_beams, adapter_names=NAMES), expected)


def test_several_sequences_are_generated_for_a_sample():
    model = two_adapters(llama())
    beams = {"num_beams": 3, "num_return_sequences": 3}
    expected = one_by_one(model, lambda model, x: generate(model, x, **beams))
    config = GenerationConfig(**GENERATION, **beams)
    generated = model.generate(input_ids=tokens(4), generation_config=config, adapter_names=NAMES)
    assert torch.equal(generated, expected)


def test_next_batch_is_that_of_the_active_adapter():
    model = two_adapters(llama())
    expected = forward(model, tokens(4))
    forward(model, tokens(4), adapter_names=NAMES)
    assert torch.equal(forward(model, tokens(4)), expected)


def test_failed_batch_leaves_no_names_behind():
    model = two_adapters(llama())
    expected = forward(model, tokens(4))
    with pytest.raises(ValueError, match="Length of"):
        forward(model, tokens(4), adapter_names=["first"])
    assert torch.equal(forward(model, tokens(4)), expected)


def test_number_of_names_must_be_that_of_the_samples():
    model = two_adapters(llama())
    with pytest.raises(ValueError, match=r"got 3 and 4 respectively at 'model\.layers\.0"):
        forward(model, tokens(4), adapter_names=NAMES[:3])


def test_unknown_name_is_refused_with_the_known_ones():
    model = two_adapters(llama())
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): third\. The model has first, second"):
        forward(model, tokens(4), adapter_names=["first", "first", "third", "second"])


def test_name_for_the_whole_batch_is_refused():
    with pytest.raises(TypeError, match=r"got str.*set_adapter"):
        forward(two_adapters(llama()), tokens(4), adapter_names="first")


def test_mixed_batch_in_training_is_refused():
    with pytest.raises(ValueError, match=r"training mode: call model\.eval"):
        forward(two_adapters(llama()).train(), tokens(4), adapter_names=NAMES)


def test_mixed_batch_beside_a_merged_adapter_is_refused():
    model = two_adapters(llama())
    model.merge_adapter(["first"])
    with pytest.raises(ValueError, match=r"first at 'model\.layers\.0.*unmerge_adapter"):
        forward(model, tokens(4), adapter_names=NAMES)


def folded(**overrides):
    model = wrap(llama(), "periodic", **overrides)
    merge_and_reinitialize(model, train(model, 1))
    return model.eval()


def test_base_model_that_is_gone_is_refused():
    with pytest.raises(POETReferenceError, match="__base__"):
        forward(folded(), tokens(2), adapter_names=["default", "__base__"])


def test_kept_initial_weights_are_the_base_model():
    model = folded(keep_initial_weights=True)
    mixed = forward(model, tokens(2), adapter_names=["default", "__base__"])
    assert relative_error(mixed[1:], forward(llama(), tokens(2)[1:])) < 1e-5
