"""The summary of a run of PEFT's tests: what passed, and why the rest did not."""

import re
from collections import Counter

from .meant import reason


def summarize(outcomes):
    """One file's part of the summary.

    Args:
        outcomes: {test: [outcome, error or reason]}, as the plugin writes it.

    Returns:
        "passed", "failed" and "skipped" are counts. "meant" has the failing test functions for every reason, with
        their number of cases; "unexplained" the first line of every other error, by test; "skips" the number of
        skipped cases by PEFT's reason.
    """
    counts = Counter(outcome for outcome, _ in outcomes.values())
    meant, unexplained, skips = {}, {}, Counter()
    for test, (outcome, message) in outcomes.items():
        if outcome == "skipped":
            skips[re.sub(r"<class '.*?(\w+)'>", r"\1", message)] += 1
        elif outcome == "failed":
            why = reason(test, message)
            if why is None:
                unexplained[test] = message.strip().partition("\n")[0]
            else:
                meant.setdefault(why, Counter())[_function(test)] += 1
    return {
        **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
        "meant": {why: dict(sorted(functions.items())) for why, functions in sorted(meant.items())},
        "unexplained": unexplained,
        "skips": dict(skips.most_common()),
    }


def markdown(results):
    """The page for the documentation.

    Args:
        results: {"versions": {package: version}, "files": {file: summary}}.
    """
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "# PEFT's own tests, run on POET",
        "",
        "PEFT tests every method with the same tables of cases. Here each row about OFT, the method closest to POET,",
        "is replaced by that row for POET, once block-stochastic and once fully stochastic; the tests are PEFT's own.",
        "In `test_target_parameters` and `test_low_level_api`, which know LoRA alone, POET stands in LoRA's place;",
        "so it does in the rows of `test_custom_models` about `nn.MultiheadAttention`.",
        "`python tests/run_peft_suite.py` takes them from PEFT's source distribution, runs them and writes this page.",
        f"It was run with {versions}, on a CPU, with tiny random models in place of those on the Hub.",
        "",
        "| file | passed | failed, meant | failed, not explained | skipped by PEFT |",
        "|---|---:|---:|---:|---:|",
    ]
    total = Counter()
    for file, summary in results["files"].items():
        unexplained = len(summary["unexplained"])
        row = {
            "passed": summary["passed"],
            "meant": summary["failed"] - unexplained,
            "unexplained": unexplained,
            "skipped": summary["skipped"],
        }
        total.update(row)
        lines.append(f"| {file} | {' | '.join(str(count) for count in row.values())} |")
    lines.append(f"| all | {' | '.join(str(total[column]) for column in row)} |")
    lines += ["", "## Failures that are meant", ""]
    for why, cases in _merged(results, "meant").items():
        lines += [why, "", *(f"- {where}" for where in cases), ""]
    if total["unexplained"]:
        lines += ["## Failures without an explanation", ""]
        for file, summary in results["files"].items():
            lines += [f"- {file}, `{test}`: `{_code(error)}`" for test, error in summary["unexplained"].items()]
        lines.append("")
    lines += ["## What PEFT's tests skip for POET", "", "| PEFT's reason | cases |", "|---|---:|"]
    skips = Counter()
    for summary in results["files"].values():
        skips.update(summary["skips"])
    lines += [f"| {why.replace('|', '/')} | {count} |" for why, count in skips.most_common()]
    return "\n".join(lines) + "\n"


def _function(test):
    return test.partition("[")[0].rpartition("::")[2]


def _code(text):
    return text.replace("`", "'")


def _merged(results, key):
    """For every reason, the files and how many cases of how many test functions failed for it."""
    merged = {}
    for file, summary in results["files"].items():
        for why, functions in summary[key].items():
            names = list(functions)
            named = f"`{names[0]}`" if len(names) == 1 else f"{len(names)} tests"
            merged.setdefault(why, []).append(f"{file}: {named}, {sum(functions.values())} cases")
    return merged
