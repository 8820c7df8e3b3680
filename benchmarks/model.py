"""Time and memory of whole training steps of a Llama, by method.

    python -m benchmarks.model                          # Llama-60M, batch 8 x 256, about eight minutes on two cores
    python -m benchmarks.model --model 20m --micro-batches 1
    python -m benchmarks.model --device cuda --dtype bfloat16 --model 130m --batch-size 32

Random weights and random tokens. Each method has a model of its own; all are in one process, and their steps are
interleaved. A step is `--micro-batches` times forward and backward, and the optimizer's step. With `--rest train`, as
in pretraining, embeddings, norms and the output head train in every method; with `--rest freeze` in none.
"""

import time

from benchmarks.harness import flags
from benchmarks.harness.llama import MERGE_INTERVAL, PRESETS, LlamaContender
from benchmarks.harness.methods import check_method, folds_every_step, is_poet
from benchmarks.harness.results import ResultFile, start
from benchmarks.harness.timing import Budget, interleave, summarize


METHODS = "full,lora-64,oft-64,poet-64,poet-128,poet-256,poet-fs-1/2,poet-128-efficient,poet-ortho-128,poet-ortho-256"
QUICK = {
    "model": "tiny",
    "vocab_size": 64,
    "batch_size": 2,
    "seq_length": 8,
    "micro_batches": [1, 2],
    "methods": ["full", "lora-4", "oft-16", "poet-16", "poet-fs-1/2", "poet-16-efficient", "poet-ortho-16"],
    "accumulating_methods": ["full", "poet-16"],
}


def add_flags(parser):
    parser.add_argument("--model", choices=list(PRESETS), default="60m")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--micro-batches", type=flags.integers, default=[1, 8], help="per optimizer step")
    parser.add_argument("--methods", type=flags.names, default=flags.names(METHODS))
    parser.add_argument(
        "--accumulating-methods",
        type=flags.names,
        default=["full", "poet-128", "poet-128-efficient"],
        help="of --methods, those that are measured with more than one micro-batch too",
    )
    parser.add_argument("--rest", choices=["train", "freeze"], default="train")
    parser.add_argument("--num-folds", type=int, default=3, help="of which the time is taken")


def methods_for(num_micro_batches, args):
    return [m for m in args.methods if num_micro_batches == 1 or m in args.accumulating_methods]


def main():
    args = flags.parse(__doc__, add_flags, QUICK, budget=480)
    for name in ("methods", "accumulating_methods"):
        if "full" not in getattr(args, name):
            raise ValueError(f"{name} {','.join(getattr(args, name))}: full is what the others are compared with")
    for method in args.methods:
        check_method(method)
    began = time.perf_counter()
    name = f"model-{args.model}" + ("" if args.rest == "train" else "-frozen-rest")
    file = ResultFile(args, "model", f"{name}-{args.device}", start(args))
    file.content["merge_interval"] = MERGE_INTERVAL
    contenders, memory = {}, {}
    for method in args.methods:
        contenders[method] = LlamaContender(method, PRESETS[args.model], args.rest == "train", args)
        memory[method] = contenders[method].memory() | contenders[method].describe()
        print(f"{method}: peak {memory[method]['peak'] / 1e6:,.0f} MB", flush=True)
    file.content["memory"] = memory
    file.content["folds"] = {
        method: contender.folds(args.num_folds)
        for method, contender in contenders.items()
        if is_poet(method) and not folds_every_step(method)
    }
    file.write()

    # A round of many micro-batches takes longer: the time is divided so that both have about as many rounds.
    costs = {n: n * len(methods_for(n, args)) for n in sorted(args.micro_batches)}
    budget = Budget(args.budget - (time.perf_counter() - began), sum(costs.values()))
    for count, cost in costs.items():
        tasks = {m: lambda c=contenders[m], n=count: c.run(n) for m in methods_for(count, args)}
        # The memory measurement was a warm-up of all methods.
        rounds = interleave(tasks, budget.share(cost), args.min_rounds, args.max_rounds, args.seed, warm_up=count == 1)
        timings = summarize(rounds, baseline="full")
        file.add({"micro_batches": count, "rounds": len(rounds), "timings": timings})
        print(f"{count} micro-batches ({len(rounds)} rounds):", end=" ")
        print(", ".join(f"{m} {timings[f'{m} step']['ratio']['median']:.2f}" for m in tasks), flush=True)
    print(f"written to {file.path}")


if __name__ == "__main__":
    main()
