"""What a user gets before the first line of maths: the wheel, the import, the public names, the README's commands."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import poet_peft


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()
COMMANDS = dict(re.findall(r"^<!-- (\w+) command -->\n```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL))


def run(*command, **kwargs):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, **kwargs)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", directory, cwd=ROOT)
    assert built.returncode == 0, built.stderr
    (path,) = directory.glob("*.whl")
    return path


def test_wheel_contains_the_package_and_nothing_else(wheel):
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "poet_peft").rglob("*.py")}
    data = {"poet_peft/model_card_template.md", "poet_peft/py.typed", "poet_peft/report/page.html"}
    info = f"poet_peft-{poet_peft.__version__}.dist-info/"
    metadata = {info + name for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")}
    assert set(zipfile.ZipFile(wheel).namelist()) == modules | data | metadata


def test_version_agrees_with_the_installed_metadata():
    assert importlib.metadata.version("poet-peft") == poet_peft.__version__


@pytest.mark.slow
def test_installed_wheel_imports_silently(wheel, tmp_path):
    """The wheel in an environment of its own; only the dependencies come from the environment that runs the tests."""
    environment = tmp_path / "environment"
    python = environment / "bin" / "python"
    assert run(sys.executable, "-m", "venv", "--without-pip", environment).returncode == 0
    installed = run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    assert installed.returncode == 0, installed.stderr
    # Directories named in a .pth file come last, and their own .pth files (an editable install of us) are not read.
    (site_packages,) = environment.glob("lib/python*/site-packages")
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "dependencies.pth").write_text("\n".join(sorted(dependencies)))

    # What PEFT's own import prints of torchao and bitsandbytes, where they are installed, is not ours.
    code = """
import sys, warnings
import peft
sys.stderr.write("PEFT is imported.")
warnings.simplefilter("error", UserWarning)
import poet_peft
assert poet_peft.__file__.startswith(sys.prefix), poet_peft.__file__
"""
    imported = run(python, "-c", code, cwd=tmp_path)
    stderr = imported.stderr.partition("PEFT is imported.")[2]
    assert (imported.returncode, imported.stdout, stderr) == (0, "", "")


def test_public_names():
    classes = {"MergeReport", "POETCallback", "POETConfig", "POETModel"}
    assert classes | {"merge_and_reinitialize", "poet_param_groups"} <= set(poet_peft.__all__)
    assert poet_peft.__all__ == sorted(poet_peft.__all__)


@pytest.mark.parametrize("name", poet_peft.__all__)
def test_public_name_has_a_docstring(name):
    doc = getattr(poet_peft, name).__doc__
    # A dataclass without a docstring gets its signature for one.
    assert doc and not doc.startswith(f"{name}(")


def test_changelog_has_the_version():
    assert f"\n## [{poet_peft.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_pin_nothing_that_the_tests_do_not_bring_along():
    """A pin of a package that nobody here needs can forbid the version that another platform's torch asks for."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(Requirement(line).name) for line in lines if not line.startswith("#")}
    installed = {canonicalize_name(distribution.name) for distribution in importlib.metadata.distributions()}
    assert pinned <= installed


def test_constraints_pin_every_direct_dependency_within_its_bounds():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(name): pin for name, pin in (line.split("==") for line in lines if line[0] != "#")}
    requirements = map(Requirement, PROJECT["dependencies"] + sum(PROJECT["optional-dependencies"].values(), []))
    for requirement in requirements:
        if requirement.name != PROJECT["name"]:
            assert pins[canonicalize_name(requirement.name)] in requirement.specifier


def test_readme_shows_both_commands_in_the_first_screen():
    assert sorted(COMMANDS) == ["pretrain", "test"]
    for command in COMMANDS.values():
        assert README[: README.index(command)].count("\n") + command.count("\n") <= 40


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_readme_command_sets_itself_up_from_what_exists(command):
    create, install, *models, main = command.strip().splitlines()
    assert create == "python3 -m venv .venv"
    extra = re.fullmatch(r'\.venv/bin/pip install -c constraints\.txt -e "\.\[(\w+)\]"', install)[1]
    assert extra in PROJECT["optional-dependencies"]
    assert all(line.startswith(".venv/bin/pip install -c constraints.txt --no-deps ") for line in models)
    assert main.startswith(".venv/bin/")
    for script in re.findall(r"\S+\.py\b", main):
        assert (ROOT / script).is_file()


@pytest.fixture
def ci(tmp_path):
    """Runs `.ci/run` in a checkout that consists of the given README."""

    def run_ci(readme):
        (tmp_path / ".ci").mkdir()
        (tmp_path / ".ci" / "run").write_bytes((ROOT / ".ci" / "run").read_bytes())
        (tmp_path / "README.md").write_text(readme)
        return run("bash", tmp_path / ".ci" / "run", cwd=tmp_path.parent)

    return run_ci


def test_ci_runs_the_readme_command_and_the_linter_and_builds_the_documentation(ci):
    command = """mkdir -p .venv/bin
echo 'echo linted "$@"' > .venv/bin/ruff
echo 'echo documented "$@"' > .venv/bin/mkdocs
chmod +x .venv/bin/ruff .venv/bin/mkdocs
echo tested"""
    result = ci(f"Title\n\n```sh\nexit 1\n```\n\n<!-- test command -->\n```sh\n{command}\n```\n\n```sh\nexit 1\n```\n")
    assert result.returncode == 0, result.stderr
    ran = ["tested", "linted check .", "linted format --check .", "documented build --strict"]
    assert result.stdout.splitlines() == ran


def test_ci_fails_where_a_line_of_the_command_fails(ci):
    result = ci("<!-- test command -->\n```sh\nfalse\necho reached\n```\n")
    assert result.returncode != 0
    assert result.stdout == ""


def test_ci_fails_without_a_readme_command(ci):
    result = ci("```sh\npytest\n```\n")
    assert result.returncode == 1
    assert "README.md has no ```sh block" in result.stderr


def test_readme_shows_what_the_results_say():
    result = run(sys.executable, "-m", "benchmarks.tables", "--check", cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_what_the_package_imports_is_declared():
    """Libraries that are imported inside functions are for quantized bases, and are there if their layers are."""
    declared = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    of_module = packages_distributions()
    missing = {}
    for path in (ROOT / "poet_peft").rglob("*.py"):
        if path.parent.name == "integrations":  # each is for those who have its framework
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                modules = [] if node.level else [node.module]
            else:
                modules = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            for module in {module.partition(".")[0] for module in modules} - sys.stdlib_module_names:
                if not {canonicalize_name(name) for name in of_module[module]} & declared:
                    missing.setdefault(module, path.name)
    assert not missing
