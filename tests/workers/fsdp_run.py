"""Training with FSDP2 by hand, as README describes it: what `tests/test_distributed.py` compares with one process.

    torchrun --nproc_per_node 2 tests/workers/fsdp_run.py DIRECTORY

Frozen weights, rotations and everything else that trains are sharded alike. What differs from a loop in one process:
`fully_shard`, and saving and loading whole states.
"""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from models import adamw, llama, poet_config, tokens, wrap
from peft import get_peft_model
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from workers.leave import leave

from poet_peft import RotationMuon, merge_and_reinitialize, poet_param_groups
from poet_peft.diagnostics import log_diagnostics


NUM_STEPS, MERGE_INTERVAL, SAVED_AT = 9, 4, (4, 5)
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def build(seed=0, every_step=False):
    """A model in the pretraining regime. With another seed everything that a checkpoint brings back is different."""
    if every_step:
        config = {"merge_interval": 1, "reinit_interval": 0, "init_weights": True}
        return wrap(llama(), "pretraining", **config).train()
    if seed == 0:
        return wrap(llama(), "pretraining", merge_interval=MERGE_INTERVAL).train()
    return get_peft_model(llama(seed=seed), poet_config("pretraining", seed=seed)).train()


def make_optimizer(model):
    # A large eps: the step of a gradient that is only rounding is not the same in two ways to add up.
    return adamw(model, eps=1e-3)


def make_rotation_muon(model):
    return RotationMuon(poet_param_groups(model, lr=1e-3, poet_lr=2e-2), eps=1e-3)


def micro_batches(step, rank, world_size):
    """Two micro-batches a step, of which every process computes its part."""
    for part in range(2):
        yield tokens(batch=4, seed=2 * step + part).chunk(world_size)[rank]


def train(model, optimizer, first=1, rank=0, world_size=1, after_step=lambda step: None):
    """The loop. Returns the loss of every step, the mean over all processes."""
    losses = []
    for step in range(first, NUM_STEPS + 1):
        total = torch.zeros(())
        for input_ids in micro_batches(step, rank, world_size):
            loss = model(input_ids=input_ids, labels=input_ids).loss / 2
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if world_size > 1:
            dist.all_reduce(total)
        losses.append(total.item() / world_size)
        after_step(step)
    return losses


def measure(model, optimizer, path, rank=0, world_size=1):
    """Append the diagnostics in the second step, before its update, to a file."""
    for step in (1, 2):
        for input_ids in micro_batches(step, rank, world_size):
            model(input_ids=input_ids, labels=input_ids).loss.backward()
        if step == 1:
            optimizer.step()
            optimizer.zero_grad()
    log_diagnostics(model, path, step, optimizer, exact=True)


def shard(model, **kwargs):
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, **kwargs)
    return fully_shard(model, **kwargs)


def save(directory, model, optimizer):
    """A directory as one process would write it. Every process must call it."""
    tensors = get_model_state_dict(model, options=WHOLE)
    state = get_optimizer_state_dict(model, optimizer, options=WHOLE)
    if dist.get_rank() == 0:
        model.save_pretrained(directory, state_dict=tensors)
        torch.save(state, directory / "optimizer.pt")
    dist.barrier()


def load(directory, seed):
    """A sharded model and its optimizer, as they were saved."""
    model = build(seed)
    model.load_adapter(directory, "default", is_trainable=True)
    optimizer = make_optimizer(shard(model))
    state = torch.load(directory / "optimizer.pt", weights_only=True)
    set_optimizer_state_dict(model, optimizer, state, options=WHOLE)
    return model, optimizer


def moments(model, optimizer):
    """The optimizer's tensors by the parameter's name, whole."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}.{key}": value.full_tensor() if isinstance(value, DTensor) else value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def main():
    directory = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    report = {}

    def finish(name, model, optimizer, losses):
        tensors = get_model_state_dict(model, options=WHOLE)
        states = moments(model, optimizer)
        report[name] = losses
        if rank == 0:
            save_file(tensors, directory / f"{name}.weights")
            save_file(states, directory / f"{name}.optimizer")

    model = shard(build())
    report["sharded"] = sorted(name for name, p in model.named_parameters() if isinstance(p, DTensor))
    optimizer = make_optimizer(model)

    def save_some(step):
        if step in SAVED_AT:
            save(directory / f"step-{step}", model, optimizer)

    losses = train(model, optimizer, rank=rank, world_size=world_size, after_step=save_some)
    finish("whole", model, optimizer, losses)
    for step in SAVED_AT:
        try:
            resumed, resumed_optimizer = load(directory / f"step-{step}", seed=9)
        except RuntimeError as error:
            report[f"resumed-{step}"] = str(error)
            continue
        losses = train(resumed, resumed_optimizer, first=step + 1, rank=rank, world_size=world_size)
        finish(f"resumed-{step}", resumed, resumed_optimizer, losses)

    # An evaluation leaves the weights of the root gathered, and a fold must not write to the copy.
    for name, wrap_layers in (("evaluated", True), ("evaluated-root", False)):
        model = build()
        model = shard(model) if wrap_layers else fully_shard(model)
        optimizer = make_optimizer(model)
        with torch.no_grad():
            before = model(input_ids=tokens()).logits
        merge_and_reinitialize(model, optimizer)
        with torch.no_grad():
            after = model(input_ids=tokens()).logits
        model.reshard()
        with torch.no_grad():
            after_reshard = model(input_ids=tokens()).logits
        report[name] = [float((x - before).abs().max()) for x in (after, after_reshard)]

    model = build()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model = shard(model)
    optimizer = make_optimizer(model)
    finish("checkpointing", model, optimizer, train(model, optimizer, rank=rank, world_size=world_size))

    model = shard(build())
    optimizer = make_rotation_muon(model)
    finish("rotation_muon", model, optimizer, train(model, optimizer, rank=rank, world_size=world_size))

    model = shard(build(every_step=True))
    optimizer = make_rotation_muon(model)
    finish("every_step", model, optimizer, train(model, optimizer, rank=rank, world_size=world_size))

    model = shard(build())
    measure(model, make_optimizer(model), directory / "diagnostics.jsonl", rank, world_size)

    model = shard(build(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    optimizer = make_optimizer(model)
    finish("bfloat16", model, optimizer, train(model, optimizer, rank=rank, world_size=world_size))
    (directory / f"rank{rank}.json").write_text(json.dumps(report))
    leave()


if __name__ == "__main__":
    main()
