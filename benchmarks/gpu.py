"""Measures POET on a GPU: correctness, speed and memory of the Triton kernels and of whole layers, into one JSON file.

    python benchmarks/gpu.py --out results.json                             # CUDA, a few minutes
    python benchmarks/gpu.py --out results.json --device cpu --quick        # the same code on a CPU, tiny, seconds

- `correctness`: largest relative error against float64, beside torch's own, and whether it is within the tolerance.
  Kernels also have to give the same bits twice. If anything fails, the command does too.
- `pieces`: each kernel beside the torch code that it replaces.
- `layers`: forward and backward of a linear layer trained in full, frozen, rotated by POET, with PEFT's LoRA and OFT,
  as `layer.py --device cuda --dtype bfloat16` measures and writes them.

Times are by CUDA events, of interleaved rounds, with quartiles. `ms` and `peak_mb` of a piece: milliseconds, and what
a call adds at most to the memory that is in use before.
"""

import argparse
import copy
import gc
import json
import math
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial

import layer
import torch
import triton
from harness import flags
from harness.methods import trainable
from harness.results import start
from harness.timing import quartiles
from peft import get_peft_model
from poet_peft.orthogonal import cayley_neumann_offset, skew

from poet_peft import POETConfig
from poet_peft.ops import reference
from poet_peft.ops import triton as triton_ops


# A sum of 16384 products in fp32.
TOLERANCE = {"float32": 5e-6, "bfloat16": 2e-5, "float16": 2e-5}
LAYER_TOLERANCE = {"float32": 5e-6, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Sizes:
    """What is measured: on a GPU, or with `--quick`, where running matters and numbers do not."""

    num_tokens: int
    layers: list[tuple[int, int]]  # (in_features, out_features)
    methods: list[str]
    layer_seconds: float  # of rounds, for all methods on one shape
    outer_products: list[tuple[int, int, int]]  # (N, dim, block size) to time
    outer_checks: list[tuple[int, int, int]]
    map_checks: list[tuple[int, int]]  # (number of blocks, block size)
    maps: list[tuple[int, int]]
    rounds: int
    sample_ms: float  # calls are repeated to last this long


FULL = Sizes(
    num_tokens=16384,
    layers=[(4096, 4096), (4096, 11008), (512, 512), (1024, 2816)],
    methods=flags.names(
        "full,frozen,lora-64,oft-32,oft-64,oft-256,poet-64,poet-64-efficient,poet-128,poet-128-efficient,poet-256,"
        "poet-256-efficient,poet-fs-1/2,poet-fs-1/2-efficient"
    ),
    layer_seconds=15.0,
    outer_products=[(16384, 4096, 64), (16384, 4096, 256), (16384, 4096, 2048), (16384, 11008, 256), (16384, 512, 64)],
    outer_checks=[
        (1, 7, 3),
        (31, 70, 33),
        (1000, 1376, 256),
        (4097, 576, 64),
        (16389, 4096, 256),
        (16384, 2048, 1024),
    ],
    map_checks=[(1, 2), (5, 17), (64, 64), (3, 100), (32, 128), (16, 256), (2, 511), (2, 512)],
    maps=[(64, 64), (32, 128), (16, 256), (43, 256), (2, 512)],
    rounds=30,
    sample_ms=3.0,
)
QUICK = Sizes(
    num_tokens=64,
    layers=[(48, 32)],
    methods=flags.names("full,frozen,lora-4,oft-8,poet-8,poet-8-efficient,poet-fs-1/2"),
    layer_seconds=0.0,
    outer_products=[(64, 24, 8)],
    outer_checks=[(1, 7, 3), (40, 70, 33)],
    map_checks=[(2, 5)],
    maps=[(2, 8)],
    rounds=2,
    sample_ms=0.0,
)


class Bench:
    """Times and memory of calls on one device."""

    def __init__(self, device, sizes):
        self.device = torch.device(device)
        self.on_gpu = self.device.type == "cuda"
        self.sizes = sizes

    def time_once(self, call, repeats):
        """Milliseconds of one of `repeats` calls in a row."""
        if not self.on_gpu:
            begin = time.perf_counter()
            for _ in range(repeats):
                call()
            return (time.perf_counter() - begin) * 1e3 / repeats
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / repeats

    def times(self, calls):
        """{name: {"median", "q1", "q3"}} of calls that take turns, in another order each round."""
        repeats = {}
        for name, call in calls.items():
            for _ in range(2):  # compiles, and fills the allocator
                call()
            estimate = self.time_once(call, 1)
            repeats[name] = max(1, min(100, round(self.sizes.sample_ms / estimate)))
        samples = {name: [] for name in calls}
        shuffle = random.Random(0).shuffle
        for _ in range(self.sizes.rounds):
            order = list(calls)
            shuffle(order)
            for name in order:
                samples[name].append(self.time_once(calls[name], repeats[name]))
        return {
            name: {key: round(value, 5) for key, value in quartiles(values).items()}
            for name, values in samples.items()
        }

    def peak_mb(self, call):
        """Most memory that a call takes beyond what was in use; None on a CPU."""
        if not self.on_gpu:
            call()
            return None
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)

    def randn(self, *shape, dtype, seed=0):
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device).to(dtype)

    def permutation(self, dim):
        return torch.randperm(dim, generator=torch.Generator().manual_seed(0), dtype=torch.int32).to(self.device)


def relative_error(actual, expected):
    difference = torch.linalg.vector_norm(actual.detach().double() - expected.detach().double())
    return float(difference / torch.linalg.vector_norm(expected.detach().double()).clamp_min(1e-300))


# The torch code that the kernels replace


def torch_block_outer(a, b, order, num_blocks, block_size):
    """Gather, then multiply."""
    features = order[: num_blocks * block_size]
    A, B = (x.index_select(1, features).unflatten(1, (num_blocks, block_size)) for x in (a, b))
    A, B = A.permute(1, 2, 0), B.permute(1, 0, 2)
    if a.dtype in (torch.float32, torch.float64):
        return A @ B
    return torch.bmm(A, B, out_dtype=torch.float32) if a.is_cuda else A.float() @ B.float()


def torch_block_outer_chunked(a, b, order, num_blocks, block_size, rows=2048):
    """The same by chunks of rows, whose copies are small enough to stay in a large L2 cache."""
    return sum(
        torch_block_outer(a_chunk, b_chunk, order, num_blocks, block_size)
        for a_chunk, b_chunk in zip(a.split(rows), b.split(rows), strict=True)
    )


def torch_map(upper, n):
    return cayley_neumann_offset(skew(upper, n))


def map_and_gradient(map_, upper, n, grad):
    upper = upper.detach().requires_grad_()
    offset = map_(upper, n)
    return offset, *torch.autograd.grad(offset, upper, grad)


def parameters_of_maps(bench, num_blocks, n):
    return 0.4 / (2 * n**0.5) * bench.randn(num_blocks, n * (n - 1) // 2, dtype=torch.float32)


# Correctness


def check_block_outer(bench):
    rows = []
    for num_tokens, dim, block_size in bench.sizes.outer_checks:
        num_blocks, remainder = divmod(dim, block_size)
        order = bench.permutation(dim)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            a, b = (bench.randn(num_tokens, dim, dtype=dtype, seed=seed) for seed in (1, 2))
            expected = torch_block_outer(a.double(), b.double(), order, num_blocks, block_size)
            out = triton_ops.block_outer(a, b, order, num_blocks, block_size)
            again = triton_ops.block_outer(a, b, order, num_blocks, block_size)
            error = relative_error(out, expected)
            if remainder:
                in_blocks = num_blocks * block_size
                expected_rest = torch_block_outer(a.double(), b.double(), order[in_blocks:], 1, remainder)
                rest = triton_ops.block_outer(a, b, order, 1, remainder, in_blocks)
                error = max(error, relative_error(rest, expected_rest))
            name = str(dtype).removeprefix("torch.")
            rows.append(
                {
                    "what": "block_outer",
                    "case": f"N={num_tokens} dim={dim} b={block_size} {name}",
                    "error": error,
                    "error_of_torch": relative_error(torch_block_outer(a, b, order, num_blocks, block_size), expected),
                    "ok": error < TOLERANCE[name] and torch.equal(out, again),
                }
            )
    return rows


def check_map(bench):
    rows = []
    for num_blocks, n in bench.sizes.map_checks:
        upper, grad = parameters_of_maps(bench, num_blocks, n), bench.randn(num_blocks, n, n, dtype=torch.float32)
        expected = map_and_gradient(torch_map, upper.double(), n, grad.double())
        by_torch = map_and_gradient(torch_map, upper, n, grad)
        by_kernel = map_and_gradient(triton_ops.cayley_neumann_offset, upper, n, grad)
        again = map_and_gradient(triton_ops.cayley_neumann_offset, upper, n, grad)
        error = max(map(relative_error, by_kernel, expected))
        rows.append(
            {
                "what": "cayley_neumann_offset",
                "case": f"{num_blocks} of {n} x {n}, value and gradient",
                "error": error,
                "error_of_torch": max(map(relative_error, by_torch, expected)),
                "ok": error < TOLERANCE["float32"] and all(map(torch.equal, by_kernel, again)),
            }
        )
    return rows


def check_layers(bench):
    """A POET layer against the readable reference in float64: output and gradients of input and rotations."""
    rows = []
    for dtype, tolerance in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        for settings in (
            {"block_size": 16},
            {"block_size": 16, "memory_efficient": True},
            {"block_size": 0.5, "variant": "fully_stochastic"},
        ):
            for num_tokens in (5, 300):
                rotated = poet_layer(72, 56, bench.device, dtype, settings)
                exact = copy.deepcopy(rotated).double()
                x, grad = (bench.randn(num_tokens, size, dtype=dtype) for size in (72, 56))
                actual = outputs_and_gradients(rotated, rotated, x, grad)
                expected = outputs_and_gradients(exact, by_reference(exact), x.double(), grad.double())
                error = max(map(relative_error, actual, expected))
                rows.append(
                    {
                        "what": "POET layer",
                        "case": f"N={num_tokens} {settings} {tolerance}",
                        "error": error,
                        "error_of_torch": None,
                        "ok": error < LAYER_TOLERANCE[tolerance],
                    }
                )
    return rows


def poet_layer(in_features, out_features, device, dtype, settings):
    """A linear layer with rotations that are not the identity."""
    model = torch.nn.Sequential(torch.nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype))
    return get_peft_model(model, POETConfig(target_modules=["0"], init_weights=False, **settings)).base_model.model[0]


def by_reference(rotated):
    def forward(x):
        R, P = ([(side["default"].index, side["default"].offsets())] for side in (rotated.poet_R, rotated.poet_P))
        return reference.poet_linear(x, rotated.base_layer.weight, rotated.base_layer.bias, R, P)

    return forward


def outputs_and_gradients(rotated, forward, x, grad):
    x = x.detach().requires_grad_()
    y = forward(x)
    return y, *torch.autograd.grad(y, [x, *trainable(rotated)], grad)


# Layers


def measure_layers(bench):
    """Every method on every shape, by `layer.py`."""
    sizes = bench.sizes
    settings = argparse.Namespace(
        device=bench.device.type,
        dtype="bfloat16",
        seed=0,
        methods=sizes.methods,
        min_rounds=min(5, sizes.rounds),
        max_rounds=sizes.rounds,
        max_gflop=math.inf,
    )
    cells = []
    for shape in sizes.layers:
        cell = layer.measure(shape, sizes.num_tokens, settings, sizes.layer_seconds, with_memory=True)
        for name, timing in cell["timings"].items():
            peak = cell["memory"][name.partition(" ")[0]]["peak"]
            print(
                f"{shape[0]} -> {shape[1]:<6} {name:28} {1e3 * timing['seconds']['median']:9.3f} ms"
                f" {timing['ratio']['median']:7.2f} of full {peak / 1e6:9.1f} MB",
                flush=True,
            )
        cells.append(cell)
    return cells


# Pieces


def measure_pieces(bench):
    rows = []
    for num_tokens, dim, block_size in bench.sizes.outer_products:
        a, b = (bench.randn(num_tokens, dim, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
        order = bench.permutation(dim)
        if 2 * block_size == dim:  # fully stochastic: an index set is sorted
            order = order[:block_size].sort().values
        arguments = (a, b, order, order.numel() // block_size, block_size)
        calls = {
            "triton": partial(triton_ops.block_outer, *arguments),
            "torch": partial(torch_block_outer, *arguments),
            "torch, by chunks": partial(torch_block_outer_chunked, *arguments),
        }
        rows += measure_piece(bench, "block_outer", f"N={num_tokens} dim={dim} b={block_size} bfloat16", calls)
    for num_blocks, n in bench.sizes.maps:
        upper, grad = parameters_of_maps(bench, num_blocks, n), bench.randn(num_blocks, n, n, dtype=torch.float32)
        calls = {
            "triton": partial(map_and_gradient, triton_ops.cayley_neumann_offset, upper, n, grad),
            "torch": partial(map_and_gradient, torch_map, upper, n, grad),
        }
        rows += measure_piece(bench, "cayley_neumann_offset", f"{num_blocks} of {n} x {n}, with gradient", calls)
    return rows


def measure_piece(bench, piece, case, calls):
    times = bench.times(calls)
    rows = [
        {"piece": piece, "case": case, "name": name, "ms": times[name], "peak_mb": bench.peak_mb(call)}
        for name, call in calls.items()
    ]
    for row in rows:
        report(f"{piece} {case}", row)
    return rows


def report(what, row):
    memory = f"{row['peak_mb']:9.1f} MB" if row["peak_mb"] is not None else ""
    print(f"{what:55} {row['name']:16} {row['ms']['median']:9.3f} ms {memory}", flush=True)


# Environment


def environment(bench):
    facts = start(argparse.Namespace(device=bench.device.type, dtype="bfloat16", threads=0))
    facts["versions"]["triton"] = triton.__version__
    facts["fp32_matmul_precision"] = torch.get_float32_matmul_precision()
    if bench.on_gpu:
        properties = torch.cuda.get_device_properties(bench.device)
        facts |= {
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": driver_version(),
        }
    return facts


def driver_version():
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, IndexError, subprocess.SubprocessError):
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that it runs, measures nothing")
    args = parser.parse_args()
    if args.device == "cpu":
        if not args.quick:
            parser.error("on a CPU the kernels are interpreted, which takes days in full: add --quick")
        os.environ["TRITON_INTERPRET"] = "1"
    if not triton_ops.is_available(args.device):
        parser.error(f"no Triton kernels on {args.device}: needs an NVIDIA GPU from Ampere on and poet_peft[triton]")

    begin = time.perf_counter()
    bench = Bench(args.device, QUICK if args.quick else FULL)
    results = {"environment": environment(bench), "sizes": asdict(bench.sizes), "interpreted": args.device == "cpu"}
    print(json.dumps(results["environment"], indent=1), flush=True)
    results["correctness"] = check_block_outer(bench) + check_map(bench) + check_layers(bench)
    failures = [check for check in results["correctness"] if not check["ok"]]
    print(f"{len(results['correctness'])} checks against float64, {len(failures)} failed", flush=True)
    for check in failures:
        print(f"FAILED {check['what']} {check['case']}: error {check['error']:.1e}", flush=True)
    results["pieces"] = measure_pieces(bench)
    results["layers"] = measure_layers(bench)
    results["seconds"] = round(time.perf_counter() - begin, 1)
    with open(args.out, "w") as file:
        json.dump(results, file, indent=1)
        file.write("\n")
    print(f"written to {args.out} after {results['seconds']} s")
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
