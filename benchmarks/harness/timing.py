"""Interleaved timing: every round runs every method once, in an order of its own."""

import itertools
import random
import statistics
import time

import torch


class Clock:
    """Seconds that a function takes on a device: `perf_counter` on a CPU, events on CUDA."""

    def __init__(self, device):
        self.on_cuda = torch.device(device).type == "cuda"

    def time(self, function):
        if not self.on_cuda:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


def interleave(tasks, seconds, min_rounds=3, max_rounds=30, seed=0, warm_up=True):
    """Rounds of all tasks, each in a shuffled order, after one that does not count, if asked for.

    Args:
        tasks: functions by name. Each does its work once and returns seconds by phase; "" is the only phase of a task
            that has just one.
        seconds: stop before a round that would end later than this, but not before `min_rounds`.

    Returns:
        The rounds: seconds by "task" or "task phase".
    """
    generator = random.Random(seed)
    names, rounds, longest = list(tasks), [], 0.0
    start = time.perf_counter()
    for number in itertools.count():
        elapsed = time.perf_counter() - start
        if len(rounds) >= max_rounds or (len(rounds) >= min_rounds and elapsed + longest > seconds):
            return rounds
        generator.shuffle(names)
        measured = {name: tasks[name]() for name in names}
        if warm_up and number == 0:
            continue
        longest = max(longest, time.perf_counter() - start - elapsed)
        rounds.append({f"{name} {phase}".strip(): t for name in tasks for phase, t in measured[name].items()})


def quartiles(values):
    """The median and the quartiles around it."""
    values = list(values)
    if len(values) == 1:
        return {"median": values[0], "q1": values[0], "q3": values[0]}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def summarize(rounds, baseline):
    """Quartiles of every timing, and of its ratio to the same phase of the task `baseline` in the same round."""
    summary = {}
    for key in rounds[0]:
        same_phase = f"{baseline} {key.partition(' ')[2]}".strip()
        divisor = same_phase if same_phase in rounds[0] else baseline
        summary[key] = {
            "seconds": quartiles(timings[key] for timings in rounds),
            "ratio": quartiles(timings[key] / timings[divisor] for timings in rounds),
        }
    return summary


class Budget:
    """Divides what is left of a time budget among the measurements to come, by their weights."""

    def __init__(self, seconds, total_weight):
        self.end = time.perf_counter() + seconds
        self.weight_left = total_weight

    def share(self, weight=1):
        share = max(0.0, self.end - time.perf_counter()) * weight / self.weight_left
        self.weight_left -= weight
        return share
