"""One Trainer run of a tiny model, whole or resumed. `tests/test_resume.py` calls it in its process and in new ones.

python tests/workers/resume_run.py '{"case": {...}, "directory": "...", "resume": "...", "seed": 7}'
"""

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from models import PERIODIC, REGIMES, llama, poet_config
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments

from poet_peft import POETCallback, RotationMuon, poet_param_groups
from poet_peft.layer import poet_layers


NUM_STEPS, MERGE_INTERVAL, CLIP_RAMP = 9, 4, 2
LENGTH = 16
PERIODIC_REST = {"regime": "periodic", "train_rest": True}  # the case in which most is to be saved


def text(num_sequences, first=0):
    """The source of a module of the standard library as bytes, one token a byte."""
    source = [byte for byte in Path(argparse.__file__).read_bytes() if byte < 128]
    starts = range(first * LENGTH, (first + num_sequences) * LENGTH, LENGTH)
    return [{"input_ids": source[i : i + LENGTH], "labels": source[i : i + LENGTH]} for i in starts]


def build(regime, train_rest=None, dtype="float32", seed=0, dropout=0.1, base=None, every_step=False):
    """A wrapped model. With another seed, everything that a checkpoint has to bring back is different.

    train_rest: None = as the regime says.
    base: the model to wrap; None = a new one.
    every_step: fold after every step, from the identity.
    With dropout by default, so that the state of the random number generator matters as well.
    """
    periodic = regime in PERIODIC
    if train_rest is None:
        train_rest = REGIMES[regime].get("train_rest", False)
    if base is None:
        base = llama(seed=seed if periodic and train_rest else 0, attention_dropout=dropout)
    interval = MERGE_INTERVAL if periodic else 0
    config = poet_config(regime, train_rest=train_rest, merge_interval=interval, seed=seed)
    if every_step:
        config = replace(config, merge_interval=1, reinit_interval=0, init_weights=True)
    torch.manual_seed(seed)
    model = get_peft_model(base.to(getattr(torch, dtype)), config)
    if periodic and seed:
        for _, layer in poet_layers(model):
            torch.nn.init.normal_(layer.get_base_layer().weight)
    return model


OPTIMIZERS = {"AdamW": torch.optim.AdamW, "RotationMuon": partial(RotationMuon, process_group="world")}


def make_trainer(case, directory, seed=0, base=None, **arguments):
    case = dict(case)
    options = {key: case.pop(key) for key in ("dtype", "dropout", "every_step") if key in case}
    model = build(case.pop("regime"), case.pop("train_rest", None), seed=seed, base=base, **options)
    eps = case.pop("eps", 1e-8)
    make_optimizer = OPTIMIZERS[case.pop("optimizer", "AdamW")]
    groups = poet_param_groups(model, lr=3e-3, poet_lr=1e-2, weight_decay=0.01)
    settings = {
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 8,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": seed,
        "data_seed": 0,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return Trainer(
        model,
        TrainingArguments(str(directory), **{**settings, **case, **arguments}),
        train_dataset=text(32),
        eval_dataset=text(8, first=64),
        callbacks=[POETCallback(CLIP_RAMP)],
        optimizers=(make_optimizer(groups, eps=eps), None),
    )


def result_of(trainer):
    """Everything that must be the same, bit for bit: tensors of the model and of the optimizer; numbers of the log."""
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    state = optimizer.state_dict()
    moments = {f"{i}.{key}": value for i, values in state["state"].items() for key, value in values.items()}
    log = [
        [entry["step"], entry["loss"], entry["grad_norm"], entry["learning_rate"]]
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return {
        "weights": {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()},
        "optimizer": moments,
        "log": log,
    }


def main():
    settings = json.loads(sys.argv[1])
    directory = Path(settings["directory"])
    trainer = make_trainer(settings["case"], directory, seed=settings["seed"])
    trainer.train(resume_from_checkpoint=settings["resume"])
    result = result_of(trainer)
    save_file({name: tensor.contiguous() for name, tensor in result["weights"].items()}, directory / "weights")
    save_file(result["optimizer"], directory / "optimizer")
    (directory / "log").write_text(json.dumps(result["log"]))


if __name__ == "__main__":
    main()
