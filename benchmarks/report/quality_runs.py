"""Runs of benchmarks/quality.py: which results belong together, which is best, and how far apart they are."""

import json
import math
import statistics
from pathlib import Path


RESULTS = Path(__file__).parents[1] / "results" / "quality"
AGAIN = "again"  # the folder of runs that were made once more
VARIANT = "-variant"  # ends the family of what the package does not have
NEAR = 1.02  # times the best loss
COMPARED = {"adamw", "muon", "poet-ortho"}


def read():
    """All results by (size, data), in the order of the pages: small models first, and what was measured most."""
    found = {}
    for path in sorted(RESULTS.glob("*/*/*.json")):
        found.setdefault((path.parts[-3], path.parts[-2]), []).append(json.loads(path.read_text("utf-8")))
    return dict(sorted(found.items(), key=lambda item: (int(item[0][0].removesuffix("m")), -len(item[1]))))


def read_again(size, data):
    """Pairs of results of runs that were made twice, in the order of their seeds."""
    folder = RESULTS / size / data
    pairs = [
        [json.loads((folder / kind / path.name).read_text("utf-8")) for kind in ("", AGAIN)]
        for path in sorted((folder / AGAIN).glob("*.json"))
    ]
    return sorted(pairs, key=lambda pair: pair[0]["run"]["seed"])


def loss_of(result):
    return math.inf if result["loss"] is None else result["loss"]


def is_variant(result):
    return result["family"].endswith(VARIANT)


def steps_of(results):
    return sorted({result["run"]["steps"] for result in results})


def short_runs(results):
    """Those of the fewest steps, of one seed."""
    return runs_of(results, steps_of(results)[0])


def runs_of(results, steps):
    """Those of a length, of one seed."""
    return [result for result in results if result["run"]["steps"] == steps and result["run"]["seed"] == 42]


def tuning_runs(results):
    """The results that chose the settings, by family, best first: one seed, the shortest runs."""
    families = {}
    for result in short_runs(results):
        if not is_variant(result):
            families.setdefault(result["family"], []).append(result)
    families = {family: sorted(runs, key=loss_of) for family, runs in families.items()}
    return dict(sorted(families.items(), key=lambda item: loss_of(item[1][0])))


def long_runs(results):
    """The results of the most steps, by family, in lists of equal settings, one a seed, the best list first.

    Best by the mean among those with the most seeds, then those with fewer: one seed may be a lucky one. None before
    all of `COMPARED` are measured.
    """
    if len(steps_of(results)) == 1:
        return {}
    longest = steps_of(results)[-1]
    settings = {}
    for result in results:
        if result["run"]["steps"] == longest:
            key = json.dumps({k: v for k, v in result["run"].items() if k != "seed"}, sort_keys=True)
            settings.setdefault((result["family"], key), []).append(result)
    families = {}
    for (family, _), runs in settings.items():
        families.setdefault(family, []).append(sorted(runs, key=lambda result: result["run"]["seed"]))
    if not families.keys() >= COMPARED:
        return {}
    return {family: sorted(lists, key=by_seeds_and_loss) for family, lists in families.items()}


def long_settings(results):
    """The lists of `long_runs`, those of all families together."""
    return [runs for lists in long_runs(results).values() for runs in lists]


def final_runs(results):
    """The best settings of each family among `long_runs`, best family first; without variants."""
    best = {family: lists[0] for family, lists in long_runs(results).items() if not is_variant(lists[0][0])}
    return dict(sorted(best.items(), key=lambda item: mean_loss(item[1])))


def by_seeds_and_loss(runs):
    """What settings are sorted by: more seeds first, then the lower mean."""
    return -len(runs), mean_loss(runs)


def mean_loss(runs):
    return statistics.mean(loss_of(run) for run in runs)


def deviation(results):
    """Standard deviation of the loss from seed to seed, and its degrees of freedom; None where no settings have two.

    Pooled over all settings of the long runs: that of three seeds alone is low or high by chance.
    """
    losses = [[loss_of(run) for run in runs] for runs in long_settings(results)]
    losses = [of_seeds for of_seeds in losses if len(of_seeds) > 1 and math.inf not in of_seeds]
    freedom = sum(len(of_seeds) - 1 for of_seeds in losses)
    if not freedom:
        return None
    squares = sum(statistics.variance(of_seeds) * (len(of_seeds) - 1) for of_seeds in losses)
    return (squares / freedom) ** 0.5, freedom


def difference(runs, baseline, of_seeds=0.0):
    """Mean and standard error of the loss over the baseline's, from the same sequences of the same seeds.

    None where no seed is common or one diverged.

    Args:
        of_seeds: standard deviation of the loss from seed to seed, which adds to what the choice of sequences would
            change. A seed that two runs share makes it no smaller: their losses hardly go together.
    """
    by_seed = {run["run"]["seed"]: run for run in baseline}
    pairs = [(run, by_seed[run["run"]["seed"]]) for run in runs if run["run"]["seed"] in by_seed]
    if not pairs or any(loss_of(run) == math.inf for pair in pairs for run in pair):
        return None
    rows = [[a - b for a, b in zip(run["losses"], other["losses"], strict=True)] for run, other in pairs]
    by_sequence = [statistics.mean(column) for column in zip(*rows, strict=True)]
    variance = statistics.variance(by_sequence) / len(by_sequence) + 2 * of_seeds**2 / len(rows)
    return statistics.mean(by_sequence), variance**0.5


def along(runs, field):
    """The runs that have this rate, and all else as the best run has it."""

    def others(run):
        return {key: value for key, value in run["run"].items() if key != field}

    return [run for run in runs if run["run"][field] is not None and others(run) == others(runs[0])]


def near_best(runs, field):
    """The values of a rate, all else as in the best run, whose loss is within `NEAR` of the best; and all tried."""
    tried = {run["run"][field]: loss_of(run) for run in along(runs, field)}
    near = [rate for rate, loss in sorted(tried.items()) if loss <= NEAR * loss_of(runs[0])]
    return near, sorted(tried)


def is_bracketed(runs):
    """Whether both rates of the best run have a worse one on both sides, all else equal."""
    for field in ("matrix_lr", "lr"):
        rate = runs[0]["run"][field]
        if rate is None:
            continue
        _, tried = near_best(runs, field)
        if rate in (tried[0], tried[-1]):
            return False
    return True
