"""Time and memory of one layer, forward and backward, against a linear layer trained in full.

    python -m benchmarks.layer                                  # CPU, about ten minutes on two cores
    python -m benchmarks.layer --device cuda --dtype bfloat16
    python -m benchmarks.layer --shapes 512x1376 --tokens 4096 --methods full,poet-128

All methods run in one process, interleaved, and every ratio is to the full layer of the same round. Gradients reach
the input and the parameters, from a given gradient of the output. POET has two timings: "first" is the first
micro-batch after an optimizer step, which changed the rotations; "later" is another one with the same rotations.
"""

from benchmarks.harness import flags
from benchmarks.harness.methods import check_method, is_poet, why_not
from benchmarks.harness.one_layer import LayerContender
from benchmarks.harness.results import ResultFile, start
from benchmarks.harness.timing import Budget, interleave, summarize


METHODS = "full,frozen,lora-64,oft-32,oft-64,oft-256,boft-4,poet-64,poet-128,poet-256,poet-fs-1/2,poet-128-efficient"
QUICK = {
    "shapes": [(64, 96)],
    "tokens": [32, 64],
    "methods": ["full", "frozen", "lora-8", "oft-16", "boft-4", "poet-16", "poet-fs-1/2", "poet-16-efficient"],
}


def add_flags(parser):
    parser.add_argument(
        "--shapes",
        type=flags.shapes,
        default=flags.shapes("512x512,512x1376,1024x2816,4096x4096,4096x11008"),
        help="input x output features",
    )
    parser.add_argument("--tokens", type=flags.integers, default=[256, 1024, 4096, 16384])
    parser.add_argument("--methods", type=flags.names, default=flags.names(METHODS))
    parser.add_argument(
        "--max-gflop",
        type=float,
        help="leave out shapes and tokens whose full layer needs more, and methods that need more than four times as "
        "much; default: 110 on a CPU, no limit on CUDA",
    )


def gflop(shape, num_tokens):
    """Of the forward and backward of a linear layer trained in full."""
    return 6e-9 * num_tokens * shape[0] * shape[1]


def max_gflop(args):
    return args.max_gflop or (110 if args.device == "cpu" else float("inf"))


def grid(args):
    cells = [(shape, n) for shape in args.shapes for n in args.tokens if gflop(shape, n) <= max_gflop(args)]
    return sorted(cells, key=lambda cell: gflop(*cell))


def memory_tokens(shape, cells):
    """Where memory is measured, once a shape: at the most tokens up to 4096, or else at the fewest."""
    tokens = sorted(n for other, n in cells if other == shape)
    return max([n for n in tokens if n <= 4096] or tokens[:1])


def measure(shape, num_tokens, args, seconds, with_memory):
    skipped, contenders, memory = {}, {}, {}
    for method in args.methods:
        reason = why_not(method, num_tokens, *shape, 4 * max_gflop(args))
        if reason:
            skipped[method] = reason
            continue
        contender = contenders[method] = LayerContender(method, shape, num_tokens, args)
        if with_memory:
            memory[method] = contender.memory()
            if is_poet(method):
                contender.check_that_steps_arrive()
    tasks = {method: contender.run for method, contender in contenders.items()}
    rounds = interleave(tasks, seconds, args.min_rounds, args.max_rounds, args.seed)
    return {
        "in_features": shape[0],
        "out_features": shape[1],
        "tokens": num_tokens,
        "rounds": len(rounds),
        "timings": summarize(rounds, baseline="full"),
        "memory": memory,
        "skipped": skipped,
    }


def main():
    args = flags.parse(__doc__, add_flags, QUICK, budget=600)
    if "full" not in args.methods:
        raise ValueError(f"--methods {','.join(args.methods)}: full is what the others are compared with")
    for method in args.methods:
        check_method(method)
    file = ResultFile(args, "layer", f"layer-{args.device}", start(args))
    cells = grid(args)
    budget = Budget(args.budget, len(cells))
    for shape, num_tokens in cells:
        cell = measure(shape, num_tokens, args, budget.share(), with_memory=num_tokens == memory_tokens(shape, cells))
        file.add(cell)
        ratios = {key: t["ratio"]["median"] for key, t in cell["timings"].items()}
        print(f"{shape[0]}x{shape[1]} N={num_tokens} ({cell['rounds']} rounds):", end=" ")
        print(", ".join(f"{key} {ratio:.2f}" for key, ratio in ratios.items()), flush=True)
    print(f"written to {file.path}")


if __name__ == "__main__":
    main()
