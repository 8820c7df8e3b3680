"""Trainer runs of tiny models under a launcher, one after the other: what `tests/test_distributed.py` compares.

torchrun --nproc_per_node 2 tests/workers/ddp_run.py DIRECTORY '{"name": {"case": {...}}, ...}'
"""

import hashlib
import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from workers.leave import leave
from workers.resume_run import make_trainer, result_of


def digest(tensors):
    """A hash of names, dtypes, shapes and bits."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().contiguous().view(-1)
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return sha.hexdigest()


def main():
    directory = Path(sys.argv[1])
    for name, settings in json.loads(sys.argv[2]).items():
        out = directory / name
        try:
            trainer = make_trainer(settings["case"], out, seed=settings.get("seed", 0))
            trainer.train(resume_from_checkpoint=settings.get("resume"))
            result = result_of(trainer)
            report = {
                "weights": digest(result["weights"]),
                "optimizer": digest(result["optimizer"]),
                "log": result["log"],
                "num_folds": trainer.callback_handler.callbacks[0] and _num_folds(trainer.model),
            }
        except Exception as error:
            report = {"error": f"{type(error).__name__}: {error}"}
        rank = trainer.args.process_index
        out.mkdir(parents=True, exist_ok=True)
        (out / f"rank{rank}.json").write_text(json.dumps(report))
    leave()


def _num_folds(model):
    from poet_peft.layer import poet_layers

    return sorted({layer.state("default").num_folds for _, layer in poet_layers(model)})


if __name__ == "__main__":
    main()
