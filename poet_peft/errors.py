"""The few errors of our own. Wrong arguments raise `ValueError` and `TypeError` as everywhere."""


class POETCheckpointError(ValueError):
    """A file does not fit the model, or contradicts itself. Raised before anything of it is loaded."""


class POETFoldError(RuntimeError):
    """The rotations cannot be folded into the weights as things stand. Raised before any weight changes."""


class POETReferenceError(RuntimeError):
    """The original weights were asked for, but training has changed them."""
