"""Adapters on a base that transformers has sharded while loading it: what `tests/test_sharded_base.py` compares.

    torchrun --nproc_per_node 2 tests/workers/native_run.py DIRECTORY

DIRECTORY/base holds the base model. The adapter is put on afterwards, so that its parameters are not sharded.
"""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from models import adamw, logits, tokens, wrap
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from workers.ddp_run import digest
from workers.fsdp_run import MERGE_INTERVAL, train
from workers.leave import leave
from workers.resume_run import make_trainer, result_of


SAVED_AT = 5


def load_base(directory, **sharding):
    return AutoModelForCausalLM.from_pretrained(directory, distributed_config=DistributedConfig(**sharding))


def build(base, seed=0):
    """Rotations as drawn from a seed, that of one process: every other process starts from others."""
    return wrap(base, "periodic", rotation_seed=seed, merge_interval=MERGE_INTERVAL).train()


def make_optimizer(model):
    # A large eps: the step of a gradient that is only rounding is not the same in two ways to add up.
    return adamw(model, eps=1e-3)


def whole_state(model):
    state = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in model.state_dict().items()}
    return {name: x.detach().clone() for name, x in state.items()}


def main():
    directory = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    report = {}

    def finish(name, model, losses):
        state = whole_state(model)
        report[name] = {"losses": losses, "weights": digest(state)}
        if rank == 0:
            save_file(state, directory / f"{name}.weights")

    def save(step):
        if step == SAVED_AT:
            model.save_pretrained(directory / "adapter", is_main_process=rank == 0)
            if rank == 0:
                torch.save(optimizer.state_dict(), directory / "optimizer.pt")
            dist.barrier()

    sharding = {"rank": rank, "world_size": world_size}
    model = build(load_base(directory / "base", fsdp_size=2), seed=rank)
    optimizer = make_optimizer(model)
    finish("whole", model, train(model, optimizer, **sharding, after_step=save))

    model = build(load_base(directory / "base", fsdp_size=2), seed=9)
    model.load_adapter(directory / "adapter", "default", is_trainable=True)
    report["loaded"] = logits(model).tolist()
    optimizer = make_optimizer(model)
    optimizer.load_state_dict(torch.load(directory / "optimizer.pt", weights_only=True))
    finish("resumed", model, train(model, optimizer, first=SAVED_AT + 1, **sharding))

    # A forward leaves the weights of the root gathered: they look like any others then.
    base = load_base(directory / "base", fsdp_size=2)
    before = logits(base)
    model = wrap(base, rotation_seed=rank, target_modules=["lm_head"], init_weights=True)
    report["inference"] = float((logits(model) - before).abs().max())
    input_ids = tokens(seed=rank)
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    report["gradients"] = [p.grad.tolist() for name, p in model.named_parameters() if ".poet_" in name]

    for name, case in {"periodic": {}, "train_rest": {"train_rest": True}}.items():
        trainer = make_trainer(
            {"regime": "periodic", "dropout": 0.0, "eps": 1e-3, **case},
            directory / name,
            base=load_base(directory / "base", fsdp_size=2),
        )
        trainer.train()
        finish(f"trainer-{name}", trainer.model, [entry[1] for entry in result_of(trainer)["log"]])

    try:
        build(load_base(directory / "base", tp_size=2, tp_plan="auto"))
    except ValueError as error:
        report["tensor_parallel"] = str(error)
    (directory / f"rank{rank}.json").write_text(json.dumps(report))
    leave()


if __name__ == "__main__":
    main()
