"""How time and memory grow with tokens, width, block size and depth.

    python -m benchmarks.scaling                      # CPU, about five minutes on two cores
    python -m benchmarks.scaling --device cuda --tokens 4096,8192,16384,32768 --widths 2048,4096,8192

One quantity is swept at a time. Tokens, width and block size belong to one square layer, depth to a Llama. The
exponents are slopes of straight lines fitted to the upper half of each sweep, in logarithms; beside them stand those
of the formulas in `harness/formulas.py`, evaluated at the same points. Memory is what lives between forward and
backward. For a Llama the formulas count the linear layers, the head and the embedding, and no attention.
"""

from benchmarks.harness import flags, formulas
from benchmarks.harness.fits import upper_half_exponent
from benchmarks.harness.llama import LlamaContender, linear_shapes
from benchmarks.harness.one_layer import LayerContender
from benchmarks.harness.results import ResultFile, start
from benchmarks.harness.timing import Budget, interleave, summarize


QUICK = {
    "tokens": [32, 64],
    "widths": [16, 32],
    "block_sizes": [4, 8],
    "depths": [1, 2],
    "base_tokens": 64,
    "base_width": 32,
    "base_block_size": 8,
    "hidden_size": 32,
    "vocab_size": 64,
    "batch_size": 2,
    "seq_length": 8,
}


def add_flags(parser):
    parser.add_argument("--tokens", type=flags.integers, default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--widths", type=flags.integers, default=[256, 512, 768, 1024, 1536, 2048])
    parser.add_argument("--block-sizes", type=flags.integers, default=[16, 32, 64, 128, 256, 512])
    parser.add_argument("--depths", type=flags.integers, default=[1, 2, 4, 8])
    parser.add_argument("--base-tokens", type=int, default=2048, help="where another quantity is swept")
    parser.add_argument("--base-width", type=int, default=1024)
    parser.add_argument("--base-block-size", type=int, default=128)
    parser.add_argument("--hidden-size", type=int, default=256, help="of the Llama whose depth is swept")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=256)


def held(memory):
    """Bytes that live between forward and backward, at the end of an accumulation."""
    return sum(memory[name] for name in ("weights", "optimizer", "gradients", "caches", "activations"))


def layer_point(args, num_tokens, width, block_size, seconds):
    """One measurement of a square layer: the full one and POET, and what the formulas say."""
    poet = f"poet-{block_size}"
    contenders = {m: LayerContender(m, (width, width), num_tokens, args) for m in ("full", poet, f"{poet}-efficient")}
    memory = {method: held(contender.memory()) for method, contender in contenders.items()}
    tasks = {method: contender.run for method, contender in contenders.items()}
    rounds = interleave(tasks, seconds, args.min_rounds, args.max_rounds, args.seed)
    timings = summarize(rounds, baseline="full")
    shape = num_tokens, width, width
    return {
        "rounds": len(rounds),
        "time": {
            "full": timings["full"],
            "POET, first": timings[f"{poet} first"],
            "POET, later": timings[f"{poet} later"],
        },
        "memory": {"full": memory["full"], "POET": memory[poet], "POET, efficient": memory[f"{poet}-efficient"]},
        "predicted_time": {
            "full": formulas.full_flops(*shape),
            "POET, first": formulas.poet_flops(*shape, block_size),
            "POET, later": formulas.poet_flops(*shape, block_size, is_first=False),
        },
        "predicted_memory": {
            "full": formulas.full_memory(*shape),
            "POET": formulas.poet_memory(*shape, block_size),
            "POET, efficient": formulas.poet_memory(*shape, block_size, copies=0),
        },
    }


def depth_point(args, depth, seconds):
    """One measurement of the training step of a Llama."""
    hidden, b = args.hidden_size, args.base_block_size
    sizes = hidden, hidden * 11 // 4, depth, max(1, hidden // 64)
    methods = {"full": "full", "POET": f"poet-{b}"}
    contenders = {name: LlamaContender(method, sizes, True, args) for name, method in methods.items()}
    memory = {name: held(contender.memory()) for name, contender in contenders.items()}
    tasks = {name: lambda c=contender: {"": c.run(1)["step"]} for name, contender in contenders.items()}
    rounds = interleave(tasks, seconds, args.min_rounds, args.max_rounds, args.seed)
    N = args.batch_size * args.seq_length
    shapes = linear_shapes(sizes)
    head = args.vocab_size, hidden
    return {
        "rounds": len(rounds),
        "time": summarize(rounds, baseline="full"),
        "memory": memory,
        "predicted_time": {
            "full": sum(formulas.full_flops(N, *shape) for shape in [*shapes, head]),
            "POET": formulas.full_flops(N, *head) + sum(formulas.poet_flops(N, *shape, b) for shape in shapes),
        },
        "predicted_memory": {
            "full": _embedding_and_head(N, *head) + sum(formulas.full_memory(N, *shape) for shape in shapes),
            "POET": _embedding_and_head(N, *head) + sum(formulas.poet_memory(N, *shape, b) for shape in shapes),
        },
    }


def _embedding_and_head(N, vocab_size, hidden_size):
    """Both trained in full, with the head's input and the logarithms of its probabilities."""
    return 2 * formulas.full_memory(0, vocab_size, hidden_size) + N * (hidden_size + vocab_size)


def sweeps(args):
    """(name, values, function of a value and seconds that gives a point)"""
    N, width, b = args.base_tokens, args.base_width, args.base_block_size
    yield "tokens", args.tokens, lambda value, seconds: layer_point(args, value, width, b, seconds)
    yield "width", args.widths, lambda value, seconds: layer_point(args, N, value, b, seconds)
    yield "block size", args.block_sizes, lambda value, seconds: layer_point(args, N, width, value, seconds)
    yield "depth", args.depths, lambda value, seconds: depth_point(args, value, seconds)


def exponents(values, points):
    """Fitted and predicted exponents by quantity ("time", "memory") and method."""
    fits = {}
    for quantity in ("time", "memory"):
        for method in points[0][quantity]:
            measured = [point[quantity][method] for point in points]
            if quantity == "time":
                measured = [timing["seconds"]["median"] for timing in measured]
            predicted = [point[f"predicted_{quantity}"][method] for point in points]
            fits.setdefault(quantity, {})[method] = {
                "fitted": upper_half_exponent(values, measured),
                "predicted": upper_half_exponent(values, predicted),
            }
    return fits


def main():
    args = flags.parse(__doc__, add_flags, QUICK, budget=300)
    file = ResultFile(args, "scaling", f"scaling-{args.device}", start(args))
    budget = Budget(args.budget, sum(len(values) for _, values, _ in sweeps(args)))
    for name, values, measure in sweeps(args):
        cell = {"sweep": name, "values": values, "points": []}
        for value in sorted(values):
            cell["points"].append(measure(value, budget.share()))
            print(f"{name} {value}: {cell['points'][-1]['rounds']} rounds", flush=True)
        cell["exponents"] = exponents(values, cell["points"])
        file.add(cell)
        for quantity, methods in cell["exponents"].items():
            for method, fit in methods.items():
                print(f"  {quantity}, {method}: {fit['fitted']:.2f}, predicted {fit['predicted']:.2f}", flush=True)
    print(f"written to {file.path}")


if __name__ == "__main__":
    main()
