"""Exact memory accounting of a training step, in bytes.

Weights, gradients and optimizer state are counted by their storages, each once. Activations are the distinct storages
that autograd keeps between forward and backward, without parameters, buffers and caches. A cache is what a step leaves
behind that is none of these. Peaks come from the allocator: on CUDA its own counter, on a CPU the allocations and
frees that the profiler records.
"""

import gc
from dataclasses import asdict, dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass
class Memory:
    """What lives during a training step, in bytes.

    Attributes:
        weights: parameters and buffers.
        optimizer: the optimizer's state.
        gradients: of the parameters.
        caches: kept from one micro-batch to the next, or from one step to the next where that is more.
        activations: kept between forward and backward; a layer's input counts where autograd keeps it.
        peak: the most that is allocated at once in steps of one micro-batch, inputs and temporaries included.
        peak_accumulating: the same where gradients are there already when the forward begins.
    """

    weights: int
    optimizer: int
    gradients: int
    caches: int
    activations: int
    peak: int
    peak_accumulating: int

    def as_dict(self):
        return asdict(self)


def storage_bytes(tensors):
    """Bytes of the distinct storages behind tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def module_tensors(module):
    return [*module.parameters(), *module.buffers()]


def optimizer_tensors(optimizer):
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]


def allocations(function, device):
    """Runs a function. Returns what it returns, the bytes it left allocated, and the most it had allocated."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        return result, torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
        gc.collect()  # so that a cycle counts neither as a cache nor later as a free
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return result, live, peak


class _SavedStorages:
    """Storages that autograd keeps for the backward."""

    def __init__(self):
        self.kept = {}

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        self.kept[storage.data_ptr()] = storage.nbytes(), StorageWeakRef(storage)
        return tensor

    def bytes_of_those_gone(self, inputs):
        """Bytes of those that lived as long as the graph, as parameters and caches do not; and of the inputs, which
        somebody else holds."""
        held = {t.untyped_storage().data_ptr() for t in inputs}
        return sum(size for at, (size, reference) in self.kept.items() if at in held or reference.expired())


class _Tally:
    """Live bytes, and the most there ever were."""

    def __init__(self, live, device):
        self.live = self.peak = live
        self.device = device

    def run(self, function):
        result, left, peak = allocations(function, self.device)
        self.peak = max(self.peak, self.live + peak)
        self.live += left
        return result


def measure_memory(module, optimizer, forward, backward, inputs, device):
    """Accounts for two optimizer steps, of one and of two micro-batches; the first one starts without any cache.

    Args:
        module: has no gradients and no cache yet.
        forward: function of nothing to the output (a loss, or a layer's output).
        backward: function of the output.
        inputs: tensors that exist before the forward, and whose gradients are dropped.
    """
    weights = storage_bytes(module_tensors(module))
    base = storage_bytes([*module_tensors(module), *inputs])
    tally = _Tally(base, device)

    def micro_batch():
        saved = _SavedStorages()
        with saved:
            output = [tally.run(forward)]
        tally.run(lambda: backward(output.pop()))
        activations = saved.bytes_of_those_gone(inputs)
        tally.run(lambda: _drop_gradients(inputs))
        return activations

    def step():
        optimizer.step()
        optimizer.zero_grad()

    activations = micro_batch()
    gradients = storage_bytes(p.grad for p in module.parameters())
    caches = tally.live - base - gradients
    tally.run(step)
    state = storage_bytes(optimizer_tensors(optimizer))
    caches = max(caches, tally.live - base - state)
    micro_batch()
    peak = tally.peak
    micro_batch()
    tally.run(step)
    return Memory(
        weights=weights,
        optimizer=state,
        gradients=gradients,
        caches=caches,
        activations=activations,
        peak=peak,
        peak_accumulating=tally.peak,
    )


def _drop_gradients(inputs):
    for tensor in inputs:
        tensor.grad = None
