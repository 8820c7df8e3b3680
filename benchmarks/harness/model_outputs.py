"""What a model of any family returns, as plain tensors: values to compare, and a loss to train on."""

import torch


class NoGradientError(RuntimeError):
    """Nothing that trains had a part in the outputs."""


def outputs(model, inputs):
    """All tensors of floating-point numbers that the model gives, from one seed."""
    torch.manual_seed(0)
    return list(tensors(model(**inputs)))


def tensors(value):
    if torch.is_tensor(value):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


@torch.no_grad()
def values(model, inputs):
    """`outputs`, to be compared."""
    return [tensor.clone() for tensor in outputs(model, inputs)]


def loss_of(found):
    """A number in which every output has a weight of its own, so that no normalisation makes it a constant."""
    generator = torch.Generator().manual_seed(2)
    total = 0
    for tensor in found:
        if tensor.requires_grad:
            weight = torch.randn(tensor.shape, generator=generator) / tensor.numel() ** 0.5
            total = total + (torch.where(torch.isfinite(tensor), tensor, 0) * weight).sum()
    if not torch.is_tensor(total):
        raise NoGradientError("no output has a gradient")
    return total


def backward(model, inputs):
    """Gradients of the loss in evaluation mode, which is without dropout, or in training mode if the model insists."""
    try:
        loss_of(outputs(model, inputs)).backward()
    except AssertionError:
        loss_of(outputs(model.train(), inputs)).backward()
        model.eval()


def has_gradient(parameter):
    return parameter.grad is not None and bool(parameter.grad.any())


def difference(actual, expected):
    """The largest relative difference of an output, inf where their shapes or what is finite in them differ."""
    if [t.shape for t in actual] != [t.shape for t in expected]:
        return float("inf")
    largest = 0.0
    for a, b in zip(actual, expected, strict=True):
        if torch.equal(a, b):
            continue
        finite = torch.isfinite(b)
        if not torch.equal(finite, torch.isfinite(a)):
            return float("inf")
        a, b = a[finite].double(), b[finite].double()
        largest = max(largest, float((a - b).norm() / b.norm().clamp_min(1e-30)))
    return largest


def in_double(inputs):
    return {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
