"""Trainer under accelerate's FSDP2, on CPUs: what `tests/test_fsdp_trainer.py` compares.

    torchrun --nproc_per_node 2 tests/workers/accelerate_fsdp_run.py DIRECTORY '{"name": {...}, ...}'

accelerate offers its FSDP plugin to accelerators only. Its state says what it found, and everything after that is the
same on every device, so the state is told to have found it.
"""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import Trainer, TrainerCallback, TrainingArguments
from workers.ddp_run import digest
from workers.leave import leave
from workers.native_run import whole_state
from workers.resume_run import CLIP_RAMP, NUM_STEPS, build, result_of, text

from poet_peft import POETCallback, poet_param_groups


SAVED_AT = (4, 5)


class FSDPTrainer(Trainer):
    """Under FSDP, Trainer takes no optimizer that was made before it."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            groups = poet_param_groups(self.model, lr=3e-3, poet_lr=1e-2, weight_decay=0.01)
            self.optimizer = torch.optim.AdamW(groups, eps=1e-3)
        return self.optimizer


class SaveSome(TrainerCallback):
    """Checkpoints in the steps that are resumed from."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in SAVED_AT


def set_plugin(state_dict_type):
    """Two CPU processes as accelerate describes two accelerators with FSDP2."""
    Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        state_dict_type=state_dict_type,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
    )
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


def make_trainer(directory, state_dict_type, regime, train_rest, seed, saves):
    model = build(regime, train_rest, seed=seed, dropout=0.0)
    args = TrainingArguments(
        str(directory),
        max_steps=NUM_STEPS,
        per_device_train_batch_size=2,
        lr_scheduler_type="cosine",
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="no",
        seed=seed,
        data_seed=0,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    assert args.device.type == "cpu"  # asked for the first time, it makes accelerate's state anew
    set_plugin(state_dict_type)
    callbacks = [POETCallback(CLIP_RAMP), *([SaveSome()] if saves else [])]
    return FSDPTrainer(model, args, train_dataset=text(32), callbacks=callbacks)


def main():
    directory = Path(sys.argv[1])
    report = {}
    for name, case in json.loads(sys.argv[2]).items():
        resume, seed = case.pop("resume", None), case.pop("seed", 0)
        trainer = make_trainer(directory / name, seed=seed, saves=resume is None, **case)
        try:
            trainer.train(resume_from_checkpoint=resume and str(directory / resume))
        except ValueError as error:
            report[name] = {"error": str(error)}
            continue
        log = [entry[1] for entry in result_of(trainer)["log"]]
        report[name] = {"log": log, "weights": digest(whole_state(trainer.model))}
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(directory / name / "last")
    (directory / f"rank{trainer.args.process_index}.json").write_text(json.dumps(report))
    leave()


if __name__ == "__main__":
    main()
