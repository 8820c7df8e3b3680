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
        test=r"fully stochastic",
        error=r"block_size=10 is larger than a side of 5 features",
        reason="A fully stochastic block is one block of the given size. A side with fewer features is refused by "
        "name: the block has to be made smaller, or given as a fraction of each side.",
    ),
    Meant(
        test=r"::test_save_load_roundtrip_fsdp_wrapped_learnable_bias\[",
        error=r"POETCheckpointError",
        reason='The test saves biases that trained and loads them under a configuration with `bias="none"`. POET '
        "refuses a file with tensors that the configuration does not announce: biases belong to the base model, and "
        "changing them unasked would change the model that `disable_adapter` and `unload` give back.",
    ),
)


def reason(test, error):
    """Why a failure is meant, or None if it is not."""
    return next((m.reason for m in MEANT if re.search(m.test, test) and re.search(m.error, error)), None)
