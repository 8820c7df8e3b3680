"""Failures of PEFT's tests that are meant: what POET refuses on purpose, where other methods go on."""

import re
from typing import NamedTuple


class Meant(NamedTuple):
    """A failure is meant if both patterns are found: another error in the same test stays a failure.

    Attributes:
        test: pattern in the test's name, `Class::function[case]`.
        error: pattern in its error.
        reason: why PEFT's expectation does not hold for POET.
    """

    test: str
    error: str
    reason: str


MEANT = (
    Meant(
        test=r"::test_save_load_roundtrip_fsdp_wrapped_learnable_bias\[",
        error=r"POETCheckpointError",
        reason='The test saves biases that trained and loads them under a configuration with `bias="none"`. POET '
        "refuses a file with tensors that the configuration does not announce: biases belong to the base model, and "
        "changing them unasked would change the model that `disable_adapter` and `unload` give back.",
    ),
    Meant(
        test=r"TestQuantization::",
        error=r"POET cannot rotate 'model\.decoder\.embed_tokens': its weight is shared",
        reason="The test targets an embedding that is tied to the output head. A rotation of one would change the "
        "other, so POET refuses it by name; PEFT itself warns of such targets. With "
        "`tie_word_embeddings=False` the embedding is rotated.",
    ),
    Meant(
        test=r"::test_from_json_file\[",
        error=r"^AssertionError: assert \{'task_type'",
        reason="The test wants nothing in the file but the configuration's fields. POET writes `file_format` "
        "besides, by which an older version recognises a file that it cannot read.",
    ),
    Meant(
        test=r"::test_(modules_to_save|inject_from_state_dict|prefix_removal|save_pretrained_warns|"
        r"adding_second_adapter|target_multiple|target_parameters_forward|target_parameter_result)|rank_pattern",
        error=r"lora_[AB]|rank_pattern|^AssertionError: assert False|assert 0 == \d+|assert \[\]",
        reason="The test reads LoRA's own matrices, ranks or classes, which have no counterpart.",
    ),
    Meant(
        test=r"target_parameters|targeting_param",
        error=r"is the weight of a layer \(\w+\), which is rotated by the name of the layer",
        reason="The test names the weight of a linear layer in `target_parameters`. POET rotates layers by their own "
        "name, so that there is one way to the same rotation, and says so.",
    ),
    Meant(
        test=r"existing_parametrization",
        error=r"target_parameters has names that match no parameter",
        reason="A weight that a parametrization computes is no parameter: what a merge or a fold wrote to it would "
        "be lost. POET refuses it.",
    ),
    Meant(
        test=r"::test_inject_from_state_dict_low_cpu_mem_usage$",
        error=r"assert \{'(cpu|meta)', '(cpu|meta)'\} == \{'meta'\}",
        reason="The test wants every tensor of a new adapter on the meta device. POET's index sets are drawn from "
        "the seed and not loaded, so they are complete at once.",
    ),
    Meant(
        test=r"low_cpu_mem_usage_with_weight_conversion",
        error=r"normal_kernel_cpu.* not implemented for 'Int'",
        reason="The test replaces every tensor of an adapter by normal random numbers, which the integers of index "
        "sets cannot be.",
    ),
    Meant(
        test=r"::test_base_model_module_named_like_peft_prefix\[",
        error=r"KeyError: <class 'poet_peft\.config\.POETConfig'>",
        reason="The test has a table of its own, by PEFT's configuration classes, of what parameters are called.",
    ),
    Meant(
        test=r"stable_diffusion",
        error=r"StableDiffusionPipeline",
        reason="The test needs diffusers, which is not installed for these runs.",
    ),
)


def reason(test, error):
    """Why a failure is meant, or None if it is not."""
    return next((m.reason for m in MEANT if re.search(m.test, test) and re.search(m.error, error)), None)
