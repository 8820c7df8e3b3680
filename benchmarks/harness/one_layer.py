"""One layer in training: what `layer.py` and `scaling.py` measure."""

import torch

from .memory import measure_memory
from .methods import adamw, autocast, build_layer, is_poet, trainable
from .timing import Clock


class NoOptimizer:
    """For a layer without trainable parameters."""

    state: dict = {}

    def step(self):
        pass

    def zero_grad(self):
        pass


class LayerContender:
    """One method's layer, its input and the gradient of its output."""

    def __init__(self, method, shape, num_tokens, args):
        dtype = getattr(torch, args.dtype)
        self.method = method
        self.clock = Clock(args.device)
        self.layer = build_layer(method, *shape, args.device, dtype, args.seed)
        parameters = trainable(self.layer)
        self.optimizer = adamw(parameters) if parameters else NoOptimizer()
        generator = torch.Generator().manual_seed(args.seed)
        self.x = torch.randn(num_tokens, shape[0], generator=generator).to(args.device, dtype).requires_grad_()
        self.grad_y = torch.randn(num_tokens, shape[1], generator=generator).to(args.device, dtype)

    def memory(self):
        device = self.x.device
        return measure_memory(
            self.layer, self.optimizer, self.forward, self.backward, [self.x, self.grad_y], device
        ).as_dict()

    def forward(self):
        with autocast(self.x.device, self.x.dtype):
            return self.layer(self.x)

    def backward(self, y):
        y.backward(self.grad_y)

    def micro_batch(self, accumulates=False):
        """Seconds of a forward and backward whose gradients land in empty places, or are added to earlier ones."""
        self.x.grad = None
        if not accumulates:
            self.optimizer.zero_grad()
        return self.clock.time(lambda: self.backward(self.forward()))

    def run(self):
        if not is_poet(self.method):
            return {"": self.micro_batch()}
        self.optimizer.step()
        return {"first": self.micro_batch(), "later": self.micro_batch(accumulates=True)}

    def check_that_steps_arrive(self):
        """A layer that kept what belongs to other rotations would be fast, and wrong."""
        self.micro_batch()
        before = self.forward()
        self.optimizer.step()
        if torch.equal(before, self.forward()):
            raise RuntimeError(f"{self.method}: an optimizer step did not change the output")
