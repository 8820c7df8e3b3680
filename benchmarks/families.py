"""Every family of models that transformers can build tiny, under POET.

What is checked is in `harness/family_check.py`.

    python -m benchmarks.families                # those that have no result yet; about half an hour on one core
    python -m benchmarks.families llama bert     # these, whether they have one or not; writes nothing
    python -m benchmarks.families --redo fails   # again those whose status it is

Offline, on one thread, each family in a process of its own with a time limit. Writes
benchmarks/results/families.json after every family; `python -m benchmarks.tables` makes docs/families.md of it.
"""

import argparse
import json
import os
import resource
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name

from benchmarks.harness.family_check import check
from benchmarks.harness.family_overrides import OVERRIDES
from benchmarks.harness.run_files import read_result


RESULT = Path(__file__).parent / "results" / "families.json"
SECONDS = 90  # of computing, for a family
# The first mapping that knows a family gives its class. What is in several is of the kind that says most of it.
KINDS = {
    "multimodal": (
        "IMAGE_TEXT_TO_TEXT",
        "VISUAL_QUESTION_ANSWERING",
        "DOCUMENT_QUESTION_ANSWERING",
        "ZERO_SHOT_IMAGE_CLASSIFICATION",
        "ZERO_SHOT_OBJECT_DETECTION",
        "RETRIEVAL",
    ),
    "speech": (
        "SPEECH_SEQ_2_SEQ",
        "CTC",
        "RNNT",
        "TDT",
        "TEXT_TO_SPECTROGRAM",
        "TEXT_TO_WAVEFORM",
        "AUDIO_CLASSIFICATION",
        "AUDIO_XVECTOR",
    ),
    "encoder-decoder": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "encoder": ("MASKED_LM", "TABLE_QUESTION_ANSWERING"),
    "causal LM": ("CAUSAL_LM",),
    "vision": (
        "IMAGE_CLASSIFICATION",
        "VIDEO_CLASSIFICATION",
        "OBJECT_DETECTION",
        "UNIVERSAL_SEGMENTATION",
        "SEMANTIC_SEGMENTATION",
        "DEPTH_ESTIMATION",
        "MASK_GENERATION",
        "KEYPOINT_DETECTION",
        "KEYPOINT_MATCHING",
        "POSE_ESTIMATION",
        "IMAGE_TO_IMAGE",
        "IMAGE_MATTING",
        "TEXT_RECOGNITION",
        "TABLE_RECOGNITION",
        "CAUSAL_IMAGE_MODELING",
        "IMAGE",
        "BACKBONE",
    ),
    "other": ("MULTIMODAL_LM", "SEQUENCE_CLASSIFICATION", "TEXT_ENCODING", "PRETRAINING", ""),
}
ORDER = "causal LM", "encoder", "encoder-decoder", "vision", "speech", "multimodal", "other"
TASK_TYPES = {"causal LM": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}


@dataclass
class Family:
    """A folder of transformers' models, with the model type and the class that stand for it."""

    name: str
    kind: str
    model_type: str
    class_name: str

    @property
    def config_class(self):
        return CONFIG_MAPPING[self.model_type]

    @property
    def model_class(self):
        return getattr(transformers, self.class_name)

    @property
    def task_type(self):
        return TASK_TYPES.get(self.kind)

    @property
    def is_multimodal(self):
        return self.kind == "multimodal"


def families():
    """All of them, by kind and name."""
    found = {}
    for kind, tasks in KINDS.items():
        for task in tasks:
            mapping = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES" if task else "MODEL_MAPPING_NAMES")
            candidates = {}
            for model_type, classes in mapping.items():
                name = model_type_to_module_name(model_type)
                # The type of the whole model, where its parts are in the mapping too.
                if name not in candidates or model_type.replace("-", "_") == name:
                    candidates[name] = model_type, classes if isinstance(classes, str) else classes[0]
            for name, (model_type, class_name) in candidates.items():
                found.setdefault(name, Family(name, kind, model_type, class_name))
    return sorted(found.values(), key=lambda family: (ORDER.index(family.kind), family.name))


def check_apart(family, seconds=SECONDS):
    """`check` in a process of its own, which ends after so many seconds of computing."""
    start = time.monotonic()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        warnings.simplefilter("ignore")
        try:
            result = check(family, OVERRIDES.get(family.name))
        except BaseException:
            result = {"status": "fails", "message": traceback.format_exc()[-300:]}
        with os.fdopen(writer, "w") as pipe:
            json.dump(result, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    about = {"kind": family.kind, "class": family.class_name, "seconds": round(time.monotonic() - start, 1)}
    if text:
        return about | json.loads(text)
    if os.WIFSIGNALED(status):
        return about | {"status": "not built", "message": f"more than {seconds} seconds of computing"}
    return about | {"status": "not built", "message": f"its process ended with {os.WEXITSTATUS(status)}"}


def write(results):
    """The whole file, one line a family."""
    about = {name: version(name).partition("+")[0] for name in ("torch", "transformers", "peft")}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(results[name])}" for name in sorted(results))
    temporary = RESULT.with_suffix(".tmp")
    total = len(families())
    temporary.write_text(
        f'{{\n "versions": {json.dumps(about)},\n "total": {total},\n "families": {{\n{lines}\n }}\n}}\n'
    )
    temporary.replace(RESULT)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="families, as transformers' folders are called; default: all")
    parser.add_argument("--redo", nargs="+", default=[], help="statuses, or names, that are checked again")
    args = parser.parse_args()

    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    everything = families()
    if unknown := set(args.names) - {family.name for family in everything}:
        sys.exit(f"no such families: {', '.join(sorted(unknown))}")
    results = (read_result(RESULT) or {"families": {}})["families"]
    results = {family.name: results[family.name] for family in everything if family.name in results}
    for family in everything:
        known = results.get(family.name, {}).get("status")
        if family.name not in args.names if args.names else known and not {known, family.name} & set(args.redo):
            continue
        result = check_apart(family)
        print(
            f"{family.name:28} {result['status']:10} {result['seconds']:6} s  {result.get('message', '')}", flush=True
        )
        if args.names:
            print(json.dumps(result, indent=1))
        else:
            results[family.name] = result
            write(results)


if __name__ == "__main__":
    main()
