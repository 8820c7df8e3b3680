"""All kinds of layers in two processes: what `tests/test_distributed_kinds.py` compares with one.

torchrun --nproc_per_node 2 tests/workers/kinds_run.py DIRECTORY
"""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from cases import wrap
from mixtures import config, moe
from models import tokens
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from workers.leave import leave

from poet_peft import POETConfig, RotationMuon, poet_param_groups


NUM_STEPS = 4
REGIMES = {"folds": {"merge_interval": 2}, "every_step": {"merge_interval": 1, "reinit_interval": 0}}
CASES = [(kind, regime) for kind in ("experts", "layers") for regime in REGIMES]
WAYS = ["fsdp", "ddp"]


class Layers(nn.Module):
    """Tokens to a loss, by an embedding, two convolutions and an attention between them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(128, 12)
        self.convolution = nn.Conv1d(12, 16, 3, padding="same")
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.grouped = nn.Conv1d(16, 8, 3, groups=4, stride=2)

    def forward(self, input_ids):
        x = torch.tanh(self.convolution(self.embedding(input_ids).mT)).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return torch.tanh(self.grouped(x.mT)).square().mean()


def build(kind, regime):
    if kind == "experts":
        return get_peft_model(moe("mixtral"), config(**REGIMES[regime])).train()
    targets = ["embedding", "convolution", "attention", "grouped"]
    return wrap(Layers(), POETConfig(target_modules=targets, block_size=4, **REGIMES[regime]))


def make_optimizer(model, regime):
    # A large eps: the step of a gradient that is only rounding is not the same in two ways to add up.
    if regime == "every_step":
        return RotationMuon(poet_param_groups(model, lr=1e-2, angle=0.05), decorrelation=0.25, eps=1e-3)
    return torch.optim.AdamW(poet_param_groups(model, lr=1e-2, poet_lr=2e-2), eps=1e-3)


def train(model, optimizer, kind, rank=0, world_size=1):
    """The loss of every step, the mean over all processes."""
    losses = []
    for step in range(NUM_STEPS):
        input_ids = tokens(batch=4, seed=step).chunk(world_size)[rank]
        loss = model(input_ids=input_ids, labels=input_ids).loss if kind == "experts" else model(input_ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if world_size > 1:
            dist.all_reduce(total)
        losses.append(total.item() / world_size)
    return losses


def spread(model, kind, way):
    """The model to call, of a model that is spread over the processes."""
    if way == "ddp":
        return DistributedDataParallel(model)
    base = model.get_base_model()
    for part in base.model.layers if kind == "experts" else [base.attention]:
        fully_shard(part)
    return fully_shard(model)


def main():
    directory = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    report = {}
    for kind, regime in CASES:
        for way in WAYS:
            model = build(kind, regime)
            called = spread(model, kind, way)
            losses = train(called, make_optimizer(model, regime), kind, rank, world_size)
            report[f"{kind}-{regime}-{way}"] = losses
            state = model.state_dict()
            state = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in state.items()}
            if rank == 0:
                save_file(state, directory / f"{kind}-{regime}-{way}.weights")
    (directory / f"rank{rank}.json").write_text(json.dumps(report))
    leave()


if __name__ == "__main__":
    main()
