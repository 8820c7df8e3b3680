"""Why a layer is not rotated: how the library's warnings say it, and how the table of families does."""

from typing import NamedTuple


class Reason(NamedTuple):
    """How a reason is found in a warning (None: by the name alone), and how the table says it."""

    sign: str | None
    label: str


REASONS = {
    "head": Reason("leaves out the output head", "output head"),
    "not called": Reason("whose rotations would not train", "read without being called"),
    "shared": Reason("leaves out layers that share their weight", "weight shared with another module"),
    "another forward": Reason("which returns something else", "not a plain linear layer"),
    "one feature": Reason("nothing to rotate", "one feature on both sides"),
    "attention": Reason("weights of their own (kdim, vdim)", "attention to another width"),
    "experts": Reason(None, "expert weights outside linear layers"),
}
