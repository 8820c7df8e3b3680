"""Run a script until a chosen moment, at which the process kills itself with SIGKILL: nothing is flushed or tidied up.

    python tests/workers/killed_run.py MOMENT STEP examples/pretrain.py ...

MOMENT is one of `MOMENTS`, in the optimizer step STEP of the run.
"""

import os
import runpy
import shutil
import signal
import sys
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from transformers import TrainerState

import poet_peft.layer
from poet_peft import POETConfig


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def patch(owner, name, replace):
    setattr(owner, name, replace(getattr(owner, name)))


def cut_in_half(path):
    os.truncate(path, os.path.getsize(path) // 2)


class Step:
    """The number of the optimizer step that Trainer is in or has just finished."""

    current = 0

    @classmethod
    def watch(cls):
        def replace(set_step):
            def on_step_begin(handler, args, state, control):
                cls.current = state.global_step + 1
                return set_step(handler, args, state, control)

            return on_step_begin

        patch(transformers.trainer_callback.CallbackHandler, "on_step_begin", replace)


def in_a_fold(step):
    """Between the third and the fourth layer."""

    def replace(fold):
        folded = []

        def until_the_third(layer, *args, **kwargs):
            if Step.current == step:
                if len(folded) == 3:
                    die()
                folded.append(layer)
            return fold(layer, *args, **kwargs)

        return until_the_third

    patch(poet_peft.layer.POETLayer, "fold", replace)


def in_the_adapter_file(step):
    """Half of the adapter's weights are on the disk, nothing after them."""

    def replace(save_pretrained):
        def half(model, directory, *args, **kwargs):
            save_pretrained(model, directory, *args, **kwargs)
            if Step.current == step:
                cut_in_half(Path(directory) / "adapter_model.safetensors")
                (Path(directory) / "adapter_config.json").unlink()
                die()

        return half

    patch(PeftModel, "save_pretrained", replace)


def before_the_adapter_config(step):
    def replace(save_pretrained):
        def not_here(config, *args, **kwargs):
            if Step.current == step:
                die()
            return save_pretrained(config, *args, **kwargs)

        return not_here

    patch(POETConfig, "save_pretrained", replace)


def in_the_optimizer_file(step):
    def replace(save):
        def half(value, path, *args, **kwargs):
            save(value, path, *args, **kwargs)
            if Step.current == step and str(path).endswith("optimizer.pt"):
                cut_in_half(path)
                die()

        return half

    patch(torch, "save", replace)


def in_the_trainer_state(step):
    """All files but the last are complete."""

    def replace(save_to_json):
        def half(state, path):
            save_to_json(state, path)
            if Step.current == step:
                cut_in_half(path)
                die()

        return half

    patch(TrainerState, "save_to_json", replace)


def in_the_deletion_of_an_old_checkpoint(step):
    def replace(rmtree):
        def first_file(directory, *args, **kwargs):
            if Step.current == step and "checkpoint-" in str(directory):
                (Path(directory) / "adapter_config.json").unlink()
                die()
            return rmtree(directory, *args, **kwargs)

        return first_file

    patch(shutil, "rmtree", replace)


MOMENTS = {
    function.__name__: function
    for function in (
        in_a_fold,
        in_the_adapter_file,
        before_the_adapter_config,
        in_the_optimizer_file,
        in_the_trainer_state,
        in_the_deletion_of_an_old_checkpoint,
    )
}


def main():
    moment, step, *sys.argv = sys.argv[1:]
    Step.watch()
    MOMENTS[moment](int(step))
    sys.path.insert(0, str(Path(sys.argv[0]).parent))  # as Python does
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
