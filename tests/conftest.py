"""The environment of every test: no network, one thread per pytest-xdist worker, whole files to one worker."""

import gc
import os
import sys
from collections import Counter
from pathlib import Path

import pytest


sys.path.append(str(Path(__file__).parents[1] / "examples"))  # as running one of them does

# Both are read once, when huggingface_hub and torch are imported: nothing above may import either.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`-n` gives each worker whole files, so that what the tests of a file share is set up once."""
    from xdist.scheduler import LoadFileScheduling

    if config.getvalue("dist") != "load":
        return None
    config.option.loadscopereorder = False  # they are in order, see below
    return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(items):
    """Files with slow tests first, then those with many, so that no worker is left with a long one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    num_tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -num_tests[item.path], item.path))


def pytest_collection_finish():
    """Leave what was imported out of all later garbage collections.

    Trainer collects garbage at the start of every run, and memory measurements many times, which would take longer
    than what is tested.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # or nanobind takes what is left at the end for leaks


@pytest.fixture(scope="session")
def forks():
    """Runs scripts as in new processes, see `launch.Forks`."""
    from launch import Forks

    with Forks() as forks:
        yield forks


@pytest.fixture(scope="session")
def periodic_run(tmp_path_factory):
    """The directory of a run with folds and `train_rest`, with a checkpoint after every step. Not to be changed."""
    from workers.resume_run import PERIODIC_REST, make_trainer

    directory = tmp_path_factory.mktemp("run")
    make_trainer(PERIODIC_REST, directory, save_strategy="steps", save_steps=1).train()
    return directory
