"""A tiny model of a family of transformers, with inputs that its forward takes."""

import copy
import itertools
import time

import torch

from .family_inputs import candidates
from .model_outputs import values
from .tiny_configs import PLANS, tiny_config


MAX_PARAMETERS = 40e6
MAX_SECONDS = 20  # of computing, until no other size is tried


class NoInputsError(Exception):
    """The model was built, and no input that is known here fits it."""


def build(family, overrides):
    """A tiny model of the family with inputs that it takes.

    Returns:
        The model, in evaluation mode, keyword arguments of its forward, and what they are in words.

    Raises:
        NoInputsError: see there.
        Exception: whatever transformers raises for the default configuration, or for all tiny ones.
    """
    start, first_error, was_built, best, tried = time.process_time(), None, False, None, []
    for plan, shrink_images in itertools.product(PLANS, (True, False)):
        if time.process_time() - start > MAX_SECONDS:
            break
        try:
            config = tiny_config(family.config_class, plan, shrink_images, overrides)
            if config.to_dict() in tried:
                continue
            tried.append(config.to_dict())
            model = _random_model(family.model_class, config)
        except Exception as error:
            first_error = first_error or error
            continue
        if model is None:
            first_error = first_error or MemoryError(f"more than {MAX_PARAMETERS / 1e6:.0f}M parameters")
            continue
        inputs, what, error = _inputs_for(model)
        if inputs is None:
            first_error = first_error if was_built else error
        elif what != "text" or not family.is_multimodal:
            return model, inputs, what
        elif best is None:
            best = model, inputs, what
        was_built = True
    if best is not None:
        return best
    if was_built:
        raise NoInputsError(short(first_error))
    raise first_error


def _random_model(model_class, config):
    """A model with random weights, none of them constant; None where it would be too large."""
    try:
        with torch.device("meta"):
            num_parameters = sum(p.numel() for p in model_class(config).parameters())
    except Exception:  # some compute with their weights while they are built
        num_parameters = 0
    if num_parameters > MAX_PARAMETERS:
        return None
    torch.manual_seed(0)
    model = model_class(copy.deepcopy(config)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # A rotation of zeros has no effect, and a gate of zero hides what is behind it.
            if (
                parameter.is_floating_point()
                and parameter.numel()
                and bool((parameter == parameter.flatten()[0]).all())
            ):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _inputs_for(model):
    first_error = None
    for what, inputs in candidates(model):
        try:
            base = values(model, inputs)
        except Exception as error:
            first_error = first_error or error
            continue
        if base and all(bool(torch.isfinite(tensor).any()) for tensor in base):
            return inputs, what, None
    return None, None, first_error or NotImplementedError("no input is known for its forward")


def short(error, length=300):
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, ValueError | RuntimeError | NoInputsError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= length else text[: length - 3] + "..."
