"""PEFT's test files, from the source distribution of the installed version."""

import contextlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import peft


class SourcesUnavailableError(RuntimeError):
    """The source distribution cannot be downloaded."""


def default_cache():
    """The folder, outside the repository, for what is downloaded."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "poet_peft" / f"peft-{peft.__version__}"


def fetch_tests(cache=None):
    """The folder with PEFT's test files, downloaded with pip unless an earlier call did.

    The folder is a package of its own name: `tests` would clash with others.

    Args:
        cache: the folder to keep it in, or None for the default.

    Raises:
        SourcesUnavailableError: pip cannot download it, for instance without a network.
    """
    cache = Path(cache or default_cache()).resolve()
    folder = cache / "peft_tests"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        requirement = f"peft=={peft.__version__}"
        pip = [sys.executable, "-m", "pip", "download", "--retries", "1", "--dest", scratch]
        pip += ["--no-deps", "--no-binary", "peft", requirement]
        run = subprocess.run(pip, capture_output=True, text=True)
        if run.returncode:
            lines = (run.stderr or run.stdout).strip().splitlines() or ["no message"]
            raise SourcesUnavailableError(
                f"pip cannot download the source distribution of {requirement}: {lines[-1]} Run it with PyPI in reach "
                f"once; the files are kept in {cache}."
            )
        (archive,) = Path(scratch).glob("peft-*.tar.gz")
        extracted = Path(scratch) / "peft_tests"
        extracted.mkdir()
        with tarfile.open(archive) as tar:
            for member in tar:
                path = Path(member.name)
                if path.parts[1:-1] == ("tests",) and path.suffix == ".py":
                    (extracted / path.name).write_bytes(tar.extractfile(member).read())
        (extracted / "__init__.py").touch()
        with contextlib.suppress(OSError):  # another process was faster
            extracted.rename(folder)
    return folder
