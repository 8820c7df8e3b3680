"""Run PEFT's own tests on POET.

    python tests/run_peft_suite.py                             # all files; writes the page of the documentation
    python tests/run_peft_suite.py test_custom_models -k merge  # some of it; writes nothing into the repository

Fetches the source distribution of the installed peft with pip, once, into ~/.cache/poet_peft. Exits with 1 if a test
fails that `peft_suite/meant.py` gives no reason for, or if a whole run never meets a failure that it does explain.
Takes about half an hour on one core.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

from peft_suite.meant import MEANT
from peft_suite.models import make_models
from peft_suite.report import markdown, summarize
from peft_suite.sources import fetch_tests


FILES = {  # the method that POET stands beside
    "test_custom_models": "OFT",
    "test_decoder_models": "OFT",
    "test_encoder_decoder_models": "OFT",
    "test_feature_extraction_models": "OFT",
    "test_seq_classifier": "OFT",
    "test_token_classification_qa": "OFT",
    "test_quantization": "OFT",
    "test_vision_models": "OFT",
    "test_target_parameters": "LoRA",
    "test_low_level_api": "LoRA",
    "test_config": "OFT",
    "test_torch_compile": "OFT",
}
REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "tests" / "peft_suite" / "results.json"
PAGE = REPOSITORY / "docs" / "peft_suite.md"
PACKAGES = ("peft", "transformers", "torch")


def prepare(work):
    """Make what PEFT's tests load, and a place for logs, in the folder `work`."""
    make_models(work / "hub")
    (work / "logs").mkdir(exist_ok=True)
    (work / "pytest.ini").write_text("[pytest]\n")


def run_file(tests, work, file, keywords=None):
    """Run one of PEFT's test files in a process of its own.

    Args:
        tests: the folder with PEFT's test files.
        work: an absolute path, the folder that `prepare` filled.
        file: name of the test file, without the suffix.
        keywords: pytest's `-k`, or None for all tests.

    Returns:
        {test: [outcome, error or reason]}.

    Raises:
        RuntimeError: pytest itself failed.
    """
    outcomes, log = work / "logs" / f"{file}.json", work / "logs" / f"{file}.log"
    outcomes.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", str(tests / f"{file}.py"), "-q", "--tb=native"]
    command += ["-c", str(work / "pytest.ini"), "--rootdir", str(work), "-p", "no:cacheprovider"]
    command += ["-p", "peft_suite.plugin", "--outcomes", str(outcomes), "--beside", FILES.get(file, "OFT")]
    command += ["-k", keywords] if keywords else []
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    path = [str(REPOSITORY), str(REPOSITORY / "tests"), environment.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, path)), "HF_HUB_OFFLINE": "1"}
    environment["PEFT_DEBUG_WITH_TORCH_COMPILE"] = "1"  # test_torch_compile is skipped without
    with log.open("w") as output:
        run = subprocess.run(command, cwd=work / "hub", env=environment, stdout=output, stderr=subprocess.STDOUT)
    if run.returncode not in (0, 1) or not outcomes.is_file():  # 1: tests failed
        raise RuntimeError(f"pytest ended with {run.returncode} on {file}: see {log}")
    return json.loads(outcomes.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="PEFT's test files, without .py; default: all that are listed here")
    parser.add_argument("-k", dest="keywords", help="as for pytest")
    parser.add_argument("--keep", action="store_true", help="do not run again what --work has outcomes of")
    parser.add_argument("--work", default="peft-suite-output", help="folder for the models and the logs")
    arguments = parser.parse_args()

    tests, work = fetch_tests(), Path(arguments.work).resolve()
    prepare(work)
    summaries = {}
    for file in arguments.files or FILES:
        kept = work / "logs" / f"{file}.json"
        is_kept = arguments.keep and not arguments.keywords and kept.is_file()
        outcomes = json.loads(kept.read_text()) if is_kept else run_file(tests, work, file, arguments.keywords)
        summaries[file] = summarize(outcomes)
        counts = {outcome: summaries[file][outcome] for outcome in ("passed", "failed", "skipped")}
        print(file, counts, f"unexplained: {len(summaries[file]['unexplained'])}", flush=True)
        for test, error in summaries[file]["unexplained"].items():
            print(f"    {test}\n        {error}")

    whole = not arguments.files and not arguments.keywords
    met = {why for summary in summaries.values() for why in summary["meant"]}
    idle = [meant for meant in MEANT if whole and meant.reason not in met]
    for meant in idle:
        print(f"explained, but not met: {meant}")
    if whole:
        versions = {name: importlib.metadata.version(name).partition("+")[0] for name in PACKAGES}
        results = {"versions": versions, "files": summaries}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(markdown(results))
        print(f"wrote {RESULTS} and {PAGE}")
    sys.exit(bool(idle) or any(summary["unexplained"] for summary in summaries.values()))


if __name__ == "__main__":
    main()
