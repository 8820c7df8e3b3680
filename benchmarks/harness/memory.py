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
        caches: kept from one micro-batch to the next.
        activations: kept between forward and backward; a layer's input counts where autograd keeps it.
        peak: the most that is allocated at once, everything above, the inputs and temporaries included.
    """

    weights: int
    optimizer: int
    gradients: int
    caches: int
    activations: int
    peak: int

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
    """Storages that autograd keeps for the backward, apart from some that are known."""

    def __init__(self, known):
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.kept = {}

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.kept[storage.data_ptr()] = storage.nbytes(), StorageWeakRef(storage)
        return tensor

    def bytes_of_those_gone(self, inputs):
        """Bytes of the storages that lived as long as the graph; of the inputs too, which somebody else holds."""
        held = {t.untyped_storage().data_ptr() for t in inputs}
        return sum(size for at, (size, reference) in self.kept.items() if at in held or reference.expired())


def measure_memory(module, optimizer, forward, backward, inputs, device):
    """Accounts for two optimizer steps of one micro-batch each; the first one starts without any cache.

    Args:
        module: has no gradients and no cache yet.
        forward: function of nothing to the output (a loss, or a layer's output).
        backward: function of the output.
        inputs: tensors that exist before the forward, and whose gradients are dropped.
    """
    base = storage_bytes([*module_tensors(module), *inputs])
    peaks, live = [], base
    for step in range(2):
        saved = _SavedStorages(module_tensors(module))
        with saved:
            output, left, peak = allocations(forward, device)
        peaks.append(live + peak)
        live += left
        held = [output]
        del output
        _, left, peak = allocations(lambda held=held: backward(held.pop()), device)
        peaks.append(live + peak)
        live += left
        if step == 0:
            activations = saved.bytes_of_those_gone(inputs)
            gradients = storage_bytes(p.grad for p in module.parameters())
            caches = live - base - gradients - storage_bytes(t.grad for t in inputs)
        _, left, peak = allocations(lambda: _finish(optimizer, inputs), device)
        peaks.append(live + peak)
        live += left
    return Memory(
        weights=storage_bytes(module_tensors(module)),
        optimizer=storage_bytes(optimizer_tensors(optimizer)),
        gradients=gradients,
        caches=caches,
        activations=activations,
        peak=max(peaks),
    )


def _finish(optimizer, inputs):
    optimizer.step()
    optimizer.zero_grad()
    for tensor in inputs:
        tensor.grad = None
