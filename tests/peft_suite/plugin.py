"""A pytest plugin: collects PEFT's tests for POET alone, and records what came of them.

Every table of PEFT's tests that has a row about OFT, or LoRA in files about what OFT cannot do, gets that row for POET
instead (see twins.py), and whatever is not about POET is deselected. Nothing of PEFT's files is changed.
"""

import functools
import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest

import poet_peft
from poet_peft.experts import ParamWrapper

from .twins import METHODS, methods, poet_arguments, twins


def pytest_addoption(parser):
    parser.addoption("--outcomes", help="JSON file for the outcome of every test")
    parser.addoption("--beside", default="OFT", choices=list(METHODS), help="the method that POET stands beside")


def pytest_configure(config):
    _stand_in_for_diffusers()
    config.pluginmanager.register(_Outcomes(config.getoption("--outcomes")))


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    """Replace the tables before pytest reads them."""
    original = metafunc.parametrize

    @functools.wraps(original)
    def parametrize(argnames, argvalues, *args, ids=None, **kwargs):
        argvalues = [
            value.values if hasattr(value, "values") and hasattr(value, "marks") else value for value in argvalues
        ]
        names = None if ids is None or callable(ids) else list(ids)
        replaced = twins(argvalues, names, metafunc.config.getoption("--beside"))
        if replaced is not None:
            argvalues, ids = replaced
        elif names is not None:
            ids = names
        return original(argnames, argvalues, *args, ids=ids, **kwargs)

    metafunc.parametrize = parametrize


def pytest_collection_modifyitems(config, items):
    kept, left_out = [], []
    for item in items:
        (kept if _is_about_poet(item) else left_out).append(item)
    items[:] = kept
    if left_out:
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def _without_skips_for_other_methods(request, monkeypatch):
    """POET rotates transformers' Conv1D and needs no biases: what skips other methods for them must not skip POET."""
    shared = sys.modules.get(f"{request.module.__package__}.testing_common")
    for module in filter(None, (request.module, shared)):
        for name in ("_skip_if_conv1d_not_supported", "_skip_if_not_conv1d_supported", "check_beft_config"):
            monkeypatch.setattr(module, name, lambda *arguments: None, raising=False)


@pytest.fixture(autouse=True)
def _poet_in_place_of_the_other(request, monkeypatch):
    """Tests that name the other method in their own body get POET under that name, and its two sides where OFT has
    one."""
    if not _names_the_other(request.node):
        return
    monkeypatch.setattr(
        request.module, _other(request.config), lambda **given: poet_peft.POETConfig(**poet_arguments(given))
    )
    if hasattr(request.module, "ParamWrapper"):
        monkeypatch.setattr(request.module, "ParamWrapper", ParamWrapper)
    if not hasattr(request.cls, "check_requires_grad"):
        return
    check = request.cls.check_requires_grad

    def check_both_sides(self, model, *names):
        both = [name.replace("oft_R", side) for name in names for side in ("poet_R", "poet_P")]
        check(self, model, *both)

    monkeypatch.setattr(request.cls, "check_requires_grad", check_both_sides)


def _is_about_poet(item):
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return poet_peft.POETConfig in methods(parameters) or _names_the_other(item)


def _names_the_other(item):
    """Whether the body of a test without a table makes the other method's configuration itself."""
    if hasattr(item, "callspec") and methods(item.callspec.params):
        return False
    names_it = _other(item.config) in item.function.__code__.co_names
    # PEFT's tests of OFT alone look at what only OFT has, except for these.
    return names_it and (item.config.getoption("--beside") != "OFT" or hasattr(item.cls, "check_requires_grad"))


def _other(config):
    return METHODS[config.getoption("--beside")][0].__name__


def _stand_in_for_diffusers():
    """PEFT's shared tester imports diffusers to tell its pipelines from models. No pipeline is tested here."""
    if importlib.util.find_spec("diffusers") is None:
        module = types.ModuleType("diffusers")
        module.__spec__ = importlib.machinery.ModuleSpec("diffusers", loader=None)
        module.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
        sys.modules["diffusers"] = module


class _Outcomes:
    """The outcome of every test, written to a JSON file when the run ends: {test: [outcome, error or reason]}."""

    def __init__(self, path):
        self.path, self.outcomes = path, {}

    def pytest_runtest_logreport(self, report):
        if report.passed and report.when != "call":
            return
        message = ""
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else str(report.longrepr)
        elif report.skipped:
            message = report.longrepr[2].removeprefix("Skipped: ")
        test = report.nodeid.partition("::")[2]
        if self.outcomes.get(test, ["passed"])[0] == "passed":
            self.outcomes[test] = [report.outcome, message]

    def pytest_collectreport(self, report):
        if report.failed:
            self.outcomes[f"collecting {report.nodeid}"] = ["failed", str(report.longrepr)]

    def pytest_sessionfinish(self):
        if self.path:
            Path(self.path).write_text(json.dumps(self.outcomes, indent=1))
