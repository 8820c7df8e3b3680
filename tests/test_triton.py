"""The Triton kernels against float64: through Triton's interpreter, and on a GPU where there is one."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import normal, relative_error

import poet_peft
from poet_peft import orthogonal
from poet_peft.ops import triton as ops


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
KERNELS = "poet_peft.ops.triton_kernels"

# Products of 16-bit numbers are exact in fp32; tensor cores add them with a few bits less than fp32 has.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-5, torch.float16: 1e-5}

for_every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture
def fresh_kernels():
    """The kernels bind to the compiler or the interpreter when they are imported: here anew, for this test.

    Triton's own functions do too, for the whole process, so they are imported first: tests that compile come after.
    """
    pytest.importorskip("triton", exc_type=ImportError)
    sys.modules.pop(KERNELS, None)
    yield
    sys.modules.pop(KERNELS, None)


@pytest.fixture(params=["interpreter", "cuda"] if torch.cuda.is_available() else ["interpreter"])
def device(request, fresh_kernels, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", str(int(request.param == "interpreter")))
    return "cpu" if request.param == "interpreter" else request.param


def permutation(dim, seed=0):
    return torch.randperm(dim, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def expected_outer(a, b, order, num_blocks, block_size, start=0):
    """Block by block in float64, from the definition."""
    blocks = []
    for i in range(num_blocks):
        features = order[start + i * block_size : start + (i + 1) * block_size].long()
        blocks.append(a.double()[:, features].T @ b.double()[:, features])
    return torch.stack(blocks)


def check_outer(device, a, b, order, *blocks):
    out = ops.block_outer(a.to(device), b.to(device), order.to(device), *blocks)
    assert (out.dtype, out.device.type) == (torch.float32, device)
    assert relative_error(out.cpu(), expected_outer(a, b, order, *blocks)) < TOLERANCE[a.dtype]


# block_outer


@for_every_dtype
@pytest.mark.parametrize("num_blocks, block_size", [(1, 2), (9, 3), (3, 16), (2, 17), (2, 64), (1, 150)])
def test_block_outer_is_the_product_of_gathered_features(device, num_blocks, block_size, dtype):
    dim = num_blocks * block_size + 5
    a, b = (normal(70, dim, seed=seed, dtype=dtype) for seed in (1, 2))
    check_outer(device, a, b, permutation(dim), num_blocks, block_size)


@for_every_dtype
@pytest.mark.parametrize("num_rows", [1, 31, 32, 33, 1024, 1025, 2600])
def test_block_outer_sums_over_all_rows(device, num_rows, dtype):
    a, b = (normal(num_rows, 10, seed=seed, dtype=dtype) for seed in (1, 2))
    check_outer(device, a, b, permutation(10), 2, 5)


def test_block_outer_of_no_rows_is_zero(device):
    empty = torch.zeros(0, 6, device=device)
    out = ops.block_outer(empty, empty, permutation(6).to(device), 2, 3)
    assert torch.equal(out.cpu(), torch.zeros(2, 3, 3))


def test_block_outer_of_no_blocks_is_empty(device):
    a = torch.ones(4, 6, device=device)
    assert ops.block_outer(a, a, permutation(6).to(device), 0, 3).shape == (0, 3, 3)


def test_block_outer_of_the_smaller_block_behind_the_others(device):
    a, b = normal(40, 23, seed=1), normal(40, 23, seed=2)
    check_outer(device, a, b, permutation(23), 1, 3, 20)


def test_block_outer_of_an_index_set(device):
    """Fully stochastic: one block on half of the features, in ascending order."""
    order = permutation(48)[:24].sort().values
    check_outer(device, normal(40, 48, seed=1), normal(40, 48, seed=2), order, 1, 24)


def test_block_outer_takes_64_bit_orders(device):
    check_outer(device, normal(9, 12, seed=1), normal(9, 12, seed=2), permutation(12).long(), 3, 4)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T.contiguous().T,
        lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
        lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
        lambda x: x[:1].expand(x.shape),
    ],
    ids=["transposed", "every-second-feature", "row-stride", "expanded"],
)
def test_block_outer_takes_any_strides(device, view):
    a, b = view(normal(33, 20, seed=1)), normal(33, 20, seed=2)
    assert a.stride() != b.stride()
    check_outer(device, a, b, permutation(20), 4, 5)
    check_outer(device, b, a, permutation(20), 4, 5)


def test_block_outer_reads_only_the_features_of_its_blocks(device):
    order = permutation(24)
    a, b = normal(40, 24, seed=1), normal(40, 24, seed=2)
    a[:, order[12:].long()] = float("nan")
    b[:, order[:2].long()] = float("nan")
    check_outer(device, a, b, order, 2, 5, 2)


def test_block_outer_gives_the_same_bits_again(device):
    a, b = (normal(3000, 12, seed=seed).to(device) for seed in (1, 2))
    first, second = (ops.block_outer(a, b, permutation(12).to(device), 2, 6) for _ in range(2))
    assert torch.equal(first, second)


@needs_triton
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"b": torch.ones(4, 5)}, r"one shape \(N, dim\), got \(4, 6\) and \(4, 5\)"),
        ({"a": torch.ones(6), "b": torch.ones(6)}, r"one shape \(N, dim\), got \(6,\)"),
        ({"b": torch.ones(4, 6).half()}, "got torch.float32 and torch.float16: cast them"),
        ({"a": torch.ones(4, 6).double(), "b": torch.ones(4, 6).double()}, "got torch.float64"),
        ({"order": torch.ones(6)}, r"a contiguous vector of integers, got torch.float32 \(6,\)"),
        ({"order": torch.arange(12)[::2]}, "a contiguous vector of integers"),
        ({"num_blocks": 3}, "3 blocks of 3 from 0 on do not fit into an order of 6 features"),
        ({"start": 1}, "2 blocks of 3 from 1 on do not fit"),
        ({"start": -1}, "2 blocks of 3 from -1 on do not fit"),
        ({"block_size": 0}, "2 blocks of 0"),
    ],
)
def test_block_outer_refuses_what_does_not_fit(monkeypatch, changes, message):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    arguments = {
        "a": torch.ones(4, 6),
        "b": torch.ones(4, 6),
        "order": permutation(6),
        "num_blocks": 2,
        "block_size": 3,
        "start": 0,
    }
    with pytest.raises(ValueError, match=message):
        ops.block_outer(**{**arguments, **changes})


# cayley_neumann_offset


def upper_triangles(*shape, n, theta=0.4, seed=1):
    """Parameters of skew-symmetric matrices with a largest singular value of about `theta`."""
    return theta / (2 * n**0.5) * normal(*shape, n * (n - 1) // 2, seed=seed)


def value_and_gradient(map_, upper, grad):
    upper = upper.detach().requires_grad_()
    offset = map_(upper)
    offset.backward(grad)
    return offset.detach(), upper.grad


def check_map(device, upper, n, grad):
    actual = value_and_gradient(lambda u: ops.cayley_neumann_offset(u, n), upper.to(device), grad.to(device))
    expected = value_and_gradient(
        lambda u: orthogonal.cayley_neumann_offset(orthogonal.skew(u, n)), upper.double(), grad.double()
    )
    for a, e in zip(actual, expected, strict=True):
        assert (a.dtype, a.device.type) == (torch.float32, device)
        assert relative_error(a.cpu(), e) < 5e-7


@pytest.mark.parametrize("n", [2, 3, 16, 17, 33, 64, 70])
def test_map_and_its_gradient_are_those_of_torch(device, n):
    check_map(device, upper_triangles(2, n=n), n, normal(2, n, n, seed=2))


@pytest.mark.parametrize("theta", [1e-4, 2.0])
def test_map_and_its_gradient_are_those_of_torch_far_and_near(device, theta):
    check_map(device, upper_triangles(2, n=20, theta=theta), 20, normal(2, 20, 20, seed=2))


def test_leading_dimensions_of_the_map_are_batch(device):
    check_map(device, upper_triangles(2, 3, n=5), 5, normal(2, 3, 5, 5, seed=2))


def test_map_of_one_matrix(device):
    check_map(device, upper_triangles(n=5), 5, normal(5, 5, seed=2))


def test_map_of_no_matrix_is_empty(device):
    upper = torch.zeros(0, 6, device=device, requires_grad=True)
    offset = ops.cayley_neumann_offset(upper, 4)
    offset.sum().backward()
    assert (offset.shape, upper.grad.shape) == ((0, 4, 4), (0, 6))


def test_map_takes_any_strides(device):
    check_map(device, upper_triangles(2, n=9).T.contiguous().T, 9, normal(2, 9, 9, seed=2).mT)
    check_map(device, upper_triangles(n=9).expand(2, -1), 9, torch.ones(1, 1, 1).expand(2, 9, 9))


def test_map_of_zero_is_the_identity_exactly(device):
    assert not ops.cayley_neumann_offset(torch.zeros(2, 15, device=device), 6).any()


def test_map_is_orthogonal_to_rounding(device):
    n = 64
    offset = ops.cayley_neumann_offset(upper_triangles(2, n=n, theta=0.01).to(device), n)
    assert orthogonal.orthogonality_error(offset.cpu().double() + torch.eye(n)) < 1e-7


def test_map_keeps_its_precision_under_autocast(device):
    n = 20
    upper = upper_triangles(n=n).to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = value_and_gradient(lambda u: ops.cayley_neumann_offset(u, n), upper, torch.ones(n, n, device=device))
    outside = value_and_gradient(lambda u: ops.cayley_neumann_offset(u, n), upper, torch.ones(n, n, device=device))
    assert all(map(torch.equal, inside, outside))


def test_map_gives_the_same_bits_again(device):
    upper, grad = upper_triangles(2, n=20).to(device), normal(2, 20, 20, seed=2).to(device)
    first, second = (value_and_gradient(lambda u: ops.cayley_neumann_offset(u, 20), upper, grad) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_map_is_refused_a_second_derivative(device):
    upper = upper_triangles(n=5).to(device).requires_grad_()
    (grad,) = torch.autograd.grad(ops.cayley_neumann_offset(upper, 5).pow(2).sum(), upper, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@needs_triton
@pytest.mark.parametrize(
    "n, num_terms, dtype",
    [(6, 1, torch.float32), (6, 4, torch.float32), (6, 3, torch.float64), (1, 3, torch.float32)],
)
def test_maps_without_a_kernel_are_those_of_torch(monkeypatch, n, num_terms, dtype):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    upper = upper_triangles(2, n=n).to(dtype)
    expected = orthogonal.cayley_neumann_offset(orthogonal.skew(upper, n), num_terms)
    assert torch.equal(ops.cayley_neumann_offset(upper, n, num_terms), expected)


@needs_triton
def test_large_blocks_go_to_torch(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(ops, "_map", None)
    assert ops.cayley_neumann_offset(torch.zeros(513 * 512 // 2), 513).shape == (513, 513)


@needs_triton
@pytest.mark.parametrize("num_terms", [2, 3])
def test_wrong_number_of_parameters_is_refused(monkeypatch, num_terms):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="a skew-symmetric 4 x 4 matrix has 6 parameters, got 5"):
        ops.cayley_neumann_offset(torch.zeros(2, 5), 4, num_terms)


# Both


def test_kernels_compile_into_torch_graphs(device):
    def loss(a, b, order, upper):
        if not ops.is_available(a.device):
            return a.sum()
        outer = ops.block_outer(a, b, order, 2, 8)
        return (outer * ops.cayley_neumann_offset(upper, 8)).sum()

    a, b = (normal(40, 20, seed=seed).to(device) for seed in (1, 2))
    order = permutation(20).to(device)
    upper = upper_triangles(2, n=8).to(device)
    ones = torch.ones((), device=device)
    eager = value_and_gradient(lambda u: loss(a, b, order, u), upper, ones)
    compiled_loss = torch.compile(loss, backend="aot_eager", fullgraph=True)
    compiled = value_and_gradient(lambda u: compiled_loss(a, b, order, u), upper, ones)
    assert all(map(torch.equal, eager, compiled))


class Launches:
    """Stands in for the kernels' module and writes down how each is launched."""

    def __init__(self):
        self.launches = []

    def __getattr__(self, name):
        return _Recorder(self.launches, name)


class _Recorder:
    def __init__(self, launches, name):
        self.launches, self.name = launches, name

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.name, args, kwargs))


def all_launches(monkeypatch):
    """Every kernel as the interface launches it, in the tile sizes that take most registers and in the smallest."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    recorder = Launches()
    monkeypatch.setattr(ops, "_kernels", lambda: recorder)
    for dtype, block_size in [(torch.float32, 64), (torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float16, 16)]:
        a = torch.zeros(9, block_size, dtype=dtype)
        ops.block_outer(a, a, permutation(block_size), 1, block_size)
    for n in (16, 64, 128):
        value_and_gradient(
            lambda u, n=n: ops.cayley_neumann_offset(u, n), torch.zeros(1, n * (n - 1) // 2), torch.zeros(1, n, n)
        )
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    return recorder.launches


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("capability", [80, 90], ids=["ampere", "hopper"])
def test_kernels_compile_without_spilling_registers(fresh_kernels, monkeypatch, tmp_path, capability):
    """By Triton's own compiler, which needs no GPU. 99 KB is the least shared memory of a GPU from Ampere on."""
    launches = all_launches(monkeypatch)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    import triton
    from triton.backends.compiler import GPUTarget

    kernels = importlib.import_module(KERNELS)
    for name, args, kwargs in launches:
        kernel = getattr(kernels, name)
        constants = {key: kwargs.pop(key) for key in ("TILE", "ROWS", "DEPTH") if key in kwargs}
        signature = {}
        for argument, value in zip(kernel.arg_names, args, strict=False):
            is_one = isinstance(value, int) and value == 1 and argument.startswith("stride")
            if is_one:
                constants[argument] = 1
            signature[argument] = "constexpr" if is_one else triton.runtime.jit.mangle_type(value)
        signature.update({argument: "constexpr" for argument in constants})
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=kwargs)
        assert compiled.metadata.shared <= 99 * 1024
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
        assert re.findall(r"STACK:(\d+)", usage) == ["0"], (name, constants, usage)


# The benchmark


@pytest.fixture
def benchmark(fresh_kernels, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    path = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def run_benchmark(benchmark, monkeypatch, out):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--quick", "--out", str(out)])
    benchmark.main()


@pytest.mark.slow
def test_benchmark_runs_and_writes_what_it_measured(benchmark, monkeypatch, tmp_path):
    run_benchmark(benchmark, monkeypatch, tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["environment"]["versions"]["torch"] == torch.__version__
    assert results["interpreted"]
    assert {check["what"] for check in results["correctness"] if check["ok"]} == {
        "block_outer",
        "cayley_neumann_offset",
        "POET layer",
    }
    assert all(check["ok"] for check in results["correctness"])
    assert {(row["piece"], row["name"]) for row in results["pieces"]} == {
        ("block_outer", "triton"),
        ("block_outer", "torch"),
        ("block_outer", "torch, by chunks"),
        ("cayley_neumann_offset", "triton"),
        ("cayley_neumann_offset", "torch"),
    }
    (layer,) = results["layers"]
    poet = {f"poet-{name} {phase}" for name in ("8", "8-efficient", "fs-1/2") for phase in ("first", "later")}
    assert set(layer["timings"]) == {"full", "frozen", "lora-4", "oft-8", *poet}
    timings = [row["ms"] for row in results["pieces"]] + [timing["seconds"] for timing in layer["timings"].values()]
    for times in timings:
        assert 0 < times["q1"] <= times["median"] <= times["q3"]


def test_benchmark_fails_when_a_kernel_is_wrong(benchmark, monkeypatch, tmp_path, capsys):
    block_outer = ops.block_outer
    monkeypatch.setattr(ops, "block_outer", lambda *args: 1.001 * block_outer(*args))
    monkeypatch.setattr(benchmark, "measure_pieces", lambda bench: [])
    monkeypatch.setattr(benchmark, "measure_layers", lambda bench: [])
    with pytest.raises(SystemExit) as exit:
        run_benchmark(benchmark, monkeypatch, tmp_path / "results.json")
    assert exit.value.code == 1
    assert "FAILED block_outer N=40 dim=70 b=33 bfloat16: error 1.0e-03" in capsys.readouterr().out
    assert (tmp_path / "results.json").exists()


# Triton is optional


def test_only_the_kernels_import_triton():
    package = Path(poet_peft.__file__).parent
    importing = [
        path.name for path in package.rglob("*.py") if re.search(r"^\s*(import|from) triton", path.read_text(), re.M)
    ]
    assert importing == ["triton_kernels.py"]


@pytest.mark.slow
def test_package_imports_and_says_what_is_missing_without_triton():
    code = f"""
import sys
sys.modules["triton"] = None
import torch
from poet_peft.ops import triton as ops
assert "{KERNELS}" not in sys.modules
assert not ops.is_available() and not ops.is_available("cpu")
x = torch.ones(4, 4)
for call in (
    lambda: ops.block_outer(x, x, torch.arange(4), 1, 4),
    lambda: ops.cayley_neumann_offset(torch.zeros(1, 6), 4),
):
    try:
        call()
    except ImportError as error:
        assert "pip install poet_peft[triton]" in str(error), error
    else:
        raise AssertionError("no ImportError")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


@needs_triton
def test_kernels_are_available_where_they_can_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert ops.is_available() == torch.cuda.is_available()
    assert not ops.is_available("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.is_available("cpu")


@needs_triton
def test_tensors_that_no_kernel_can_read_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = "run on CUDA devices from Ampere on, not on cpu: use torch there, or set TRITON_INTERPRET=1"
    with pytest.raises(ValueError, match=message):
        ops.block_outer(torch.ones(4, 4), torch.ones(4, 4), permutation(4), 1, 4)
    with pytest.raises(ValueError, match=message):
        ops.cayley_neumann_offset(torch.zeros(1, 6), 4)
