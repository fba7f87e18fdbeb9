"""The benchmark of the adapter with InfoNCE: it runs, its rows are whole, its variants agree. Never a time."""

from __future__ import annotations

import csv
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from .kernels.memory import peak_bytes

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
MIB = 2**20
CPU_IMPLS = ["ours_torch", "eager", "chunked", "compile", "st_mnrl", "st_cached_mnrl"]
CUDA_IMPLS = ["ours_triton", "compile_reduce_overhead", "inf_cl", "memeff"]
SCRIPT = str(BENCHMARKS / "bench_adapter_info_nce.py")
# Runs the script's own functions in a process of their own: the script sets sys.path for itself.
ALONE = """import sys
sys.path.insert(0, {folder!r})
import bench_adapter_info_nce as bench, bench_timing, torch
{code}"""


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def alone(code: str) -> list[str]:
    return run("-c", ALONE.format(folder=str(BENCHMARKS), code=code)).split()


@pytest.mark.slow
def test_a_quick_run_writes_whole_rows_of_every_cpu_variant(tmp_path: Path) -> None:
    out = tmp_path / "data" / "rows.csv"
    printed = run(SCRIPT, "--quick", "--device", "cpu", "--out", str(out), "--commit", "abc1234")
    with out.open(newline="") as handle:
        reader = csv.DictReader(handle)
        rows = list(reader)
    assert reader.fieldnames == (
        "date op directions impl mode method B D H E columns dtype device torch triton commit p20_ms p50_ms p80_ms "
        "cpu_ms peak_mib floor_ms share_of_floor copy_gb_s matmul_tflop_s loss_error grad_error rounds error"
    ).split(" ")
    # A variant whose loss or gradients differ from the truth has an error and no other row; so has one not run here.
    failed, rows = [row for row in rows if row["error"]], [row for row in rows if not row["error"]]
    assert [(row["impl"], row["mode"], row["method"], row["error"][:9]) for row in failed] == [
        (impl, "both", "", "not run: ") for impl in CUDA_IMPLS
    ] * 2
    assert sorted((row["op"], row["impl"], row["mode"]) for row in rows) == sorted(
        (op, impl, mode)
        for op in ("adapter_info_nce", "info_nce")
        for impl in CPU_IMPLS
        for mode in ("forward", "backward", "both")
    )
    for row in rows:
        shape = [row[name] for name in ("B", "D", "H", "E", "columns", "dtype", "directions", "commit", "torch")]
        assert shape == ["72", "64", "48", "32", "72", "float32", "1", "abc1234", torch.__version__]
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["floor_ms"]) / float(row["p50_ms"]) == pytest.approx(float(row["share_of_floor"]), abs=1e-4)
        assert (row["peak_mib"] == "") == (row["mode"] == "backward")
        # Float32 against float64: no variant is exact to the last bit, and none is far off.
        assert 1e-10 < float(row["loss_error"]) < 1e-5
        assert 1e-8 < float(row["grad_error"]) < 1e-4
    eager = next(row for row in rows if (row["op"], row["impl"], row["mode"]) == ("info_nce", "eager", "both"))
    assert float(eager["peak_mib"]) > 2 * 72 * 72 * 4 / MIB  # logits and their gradient at least
    for name in CUDA_IMPLS:
        assert f"{name}: not run: " in printed
    table = [line.split() for line in printed.splitlines() if line.startswith(("adapter_info_nce ", "info_nce "))]
    assert [line[5] for line in table] == CPU_IMPLS * 2
    assert {tuple(line[7:9] + line[10:11]) for line in table if line[5] == "ours_torch"} == {("1.00", "1.00", "1.00")}


def rows_of(out: Path) -> list[dict[str, str]]:
    with out.open(newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.mark.slow
def test_runs_append_resume_and_agree_in_both_directions(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    fixed = ["--quick", "--device", "cpu", "--out", str(out), "--directions", "2", "--commit", "abc1234"]
    first, second = ["eager"], ["ours_torch", "eager", "chunked", "st_mnrl", "st_cached_mnrl"]
    for impls in (first, second):
        run(SCRIPT, *fixed, "--impls", *impls)
    rows = rows_of(out)
    assert [row["impl"] for row in rows if row["mode"] == "both" and not row["error"]] == first * 2 + second * 2
    assert {row["directions"] for row in rows} == {"2"}
    assert len(rows) == 3 * 2 * (1 + 5)
    # One group loses a row, as if cut off; with the other dims there are two groups more.
    lines = out.read_text().splitlines(keepends=True)
    kept = [line for line in lines if ",info_nce,2,chunked,both," not in line]
    assert len(kept) == len(lines) - 1
    out.write_text("".join(kept))
    printed = run(SCRIPT, *fixed, "--resume", "--dims", "64,48,32", "32,16,8", "--impls", "eager", "chunked")
    assert "adapter_info_nce, 2 direction(s), 64-48-32, B 72: in the file already" in printed
    added = [(row["op"], row["E"], row["impl"]) for row in rows_of(out)[len(kept) - 1 :] if row["mode"] == "both"]
    assert added == [
        (op, e, impl)
        for op, e in (("adapter_info_nce", "8"), ("info_nce", "32"), ("info_nce", "8"))
        for impl in ("eager", "chunked")
    ]


def test_it_refuses_a_file_with_other_columns(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    header = "date,op,directions,impl,mode,method,B,error\n"
    out.write_text(header)
    asked = [sys.executable, SCRIPT, "--quick", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert "missing: B" not in done.stderr
    assert "grad_error, loss_error" in done.stderr
    assert "another file" in done.stderr
    assert "direction(s)" not in done.stdout  # before anything is measured
    assert out.read_text() == header
    code = f"""
from bench_place import append_rows
out = bench.Path({str(tmp_path / "two.csv")!r})
for columns in ("ab", "ab", "ba"):
    try:
        append_rows(out, columns, [{{"a": 1, "b": 2}}])
        print("appended")
    except SystemExit as refused:
        print("refused", "order" in str(refused))
print(repr(out.read_text()))
"""
    assert alone(code) == ["appended", "appended", "refused", "True", repr("a,b\n1,2\n1,2\n")]


def test_a_group_is_whole_once_every_variant_is_timed_or_in_error(tmp_path: Path) -> None:
    code = f"""
fixed = dict(dtype="bfloat16", device="GPU", torch="2", triton="3", commit="abc")
impls, cuda = ["eager", "compile_reduce_overhead", "memeff"], torch.device("cuda")
def add(path, impl, method, rows, **other):
    shape = dict(op="info_nce", directions=1, D=768, H=512, E=128, B=rows, mode="both")
    bench.append_rows(path, bench.FIELDS, [fixed | shape | dict(impl=impl, method=method) | other])
    return {{group[-1] for group in bench.finished(path, fixed, impls, cuda)}} or "none"
small, large = bench.Path({str(tmp_path / "small.csv")!r}), bench.Path({str(tmp_path / "large.csv")!r})
for impl, method in (("memeff", ""), ("eager", "events"), ("eager", "wall"), ("compile_reduce_overhead", "events"),
                     ("compile_reduce_overhead", "wall"), ("eager", "graph")):
    print(add(small, impl, method, 4096))
add(large, "memeff", "", 16384), add(large, "compile_reduce_overhead", "", 16384)
print(add(large, "eager", "events", 16384, mode="forward"), add(large, "eager", "events", 16384, commit="def"))
print(add(large, "eager", "events", 16384))
"""
    assert alone(code) == ["none"] * 5 + ["{4096}"] + ["none"] * 2 + ["{16384}"]


def test_groups_come_in_order_of_weight() -> None:
    code = """
for op, directions, dims, rows in bench.groups(bench.OPS, [1, 2], [(7, 5, 3), (4, 3, 2)], [256, 16384, 65536, 262144]):
    print(op, directions, dims[0], rows)
"""
    one, two = ["256", "16384", "65536", "262144"], ["16384", "65536", "256", "262144"]
    assert alone(code) == [
        cell
        for op in ("adapter_info_nce", "info_nce")
        for directions, batches in (("1", one), ("2", two))
        for width in ("7", "4")
        for rows in batches
        for cell in (op, directions, width, rows)
    ]


def test_a_run_ends_within_its_seconds(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    asked = ["--quick", "--device", "cpu", "--out", str(out), "--impls", "eager"]
    assert run(SCRIPT, *asked, "--budget-s", "50").count("not run, too little of the 50 s is left") == 2
    assert not out.exists()
    code = """
problem = bench.Problem("info_nce", bench.Shape(24, 8, 8, 16), 1, torch.device("cpu"), torch.float32, 2)
options = bench.argparse.Namespace(impls=["eager"], seconds=1, rounds=2, deadline=0.0)
try:
    list(bench.measure(problem, bench.Ceilings(1, 1), options))
except bench.OutOfTimeError:
    print("cut")
"""
    assert alone(code) == ["cut"]


def test_a_variant_with_another_loss_or_gradient_is_not_timed() -> None:
    code = """
problem = bench.Problem("info_nce", bench.Shape(24, 8, 8, 16), 1, torch.device("cpu"), torch.float32, 2)
truths = [bench.true_values(problem, index) for index in range(2)]
right = bench.Variant("eager", problem)
bench.prepare(right, truths)
print(0 < right.errors.loss < 1e-6, 0 < right.errors.gradients < 1e-5, sorted(right.peak_mib))
exact, second = right.loss, problem.pool[1][0]
for wrong in (lambda a, b: exact(a, b) * 1.01, lambda a, b: exact(a, b.detach()),
              lambda a, b: exact(a, b) * 2 - exact(a, b).detach(),
              lambda a, b: exact(a, b) * (1.01 if a is second else 1)):
    right.loss = wrong
    try:
        bench.prepare(right, truths)
    except ValueError as error:
        print(str(error).split()[0], str(error).split()[-2:] == ["not", "timed"])
"""
    right = ["True", "True", "['both',", "'forward']"]
    assert alone(code) == [*right, "loss", "True", "a", "True", "gradients", "True", "loss", "True"]


def test_a_wrong_variant_has_one_row_and_the_others_theirs() -> None:
    code = """
eager = bench_timing.build
def twice(impl, problem):
    return (lambda a, b: 2 * eager("eager", problem)(a, b)) if impl == "st_mnrl" else eager(impl, problem)
bench_timing.build = twice
problem = bench.Problem("adapter_info_nce", bench.Shape(24, 8, 8, 16), 1, torch.device("cpu"), torch.float32, 2)
options = bench.argparse.Namespace(impls=["st_mnrl", "chunked"], seconds=1, rounds=2, deadline=bench.math.inf)
for row in bench.measure(problem, bench.Ceilings(1, 1), options):
    print("row", row["impl"], row["mode"], "p50_ms" in row, row.get("error", "")[:17])
"""
    printed = run("-c", ALONE.format(folder=str(BENCHMARKS), code=code)).splitlines()
    assert [line.strip() for line in printed if line.startswith("row")] == [
        "row st_mnrl both False ValueError: loss",
        "row chunked forward True",
        "row chunked backward True",
        "row chunked both True",
    ]


def test_it_runs_from_the_checkout_and_the_wheels_it_is_given(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "peer_of_ours-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer_of_ours/__init__.py", "kernel_source = __file__")
    code = f"""
print("kellm_features" in sys.modules, "pydantic" in sys.modules, "sentence_transformers" in sys.modules)
bench.add_wheels(bench.Path({str(tmp_path)!r}))
import peer_of_ours
print(bench.Path(peer_of_ours.kernel_source).is_file())
"""
    assert alone(code) == ["False", "False", "False", "True"]


AUTOGRAD = """
from torch.nn import functional as F
import bench_variants
def autograd(problem, index):
    leaves = [leaf.detach().double().requires_grad_() for leaf in problem.leaves(index)]
    pair = [v.detach().double() for v in problem.pool[index]]
    if problem.op == "adapter_info_nce":
        w1, b1, w2, b2 = leaves
        a, b = (F.normalize(F.linear(F.gelu(F.linear(v, w1, b1)), w2, b2)) for v in pair)
    else:
        a, b = leaves
    logits, own = a @ b.T / 0.03, torch.arange(len(a))
    loss = F.cross_entropy(logits, own)
    if problem.directions == 2:
        loss = (loss + F.cross_entropy(logits.T, own)) / 2
    return loss.item(), torch.autograd.grad(loss, leaves)
def problems(rows, dtype=torch.float32):
    for op in bench.OPS:
        for directions in (1, 2):
            yield bench.Problem(op, bench.Shape(rows, 8, 12, 16), directions, torch.device("cpu"), dtype, 2)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_truth_is_cross_entropy_in_blocks_of_any_size(dtype: str) -> None:
    code = f"""{AUTOGRAD}
for problem in problems(24, torch.{dtype}):
    loss, gradients = autograd(problem, 1)
    for size in (1, 100, 10000, None):
        got = bench.true_values(problem, 1, size)
        print(abs(got.loss - loss) < 1e-12 * loss, *(
            torch.allclose(mine, theirs, rtol=1e-10, atol=1e-13) and bool(theirs.any())
            for mine, theirs in zip(got.gradients, gradients, strict=True)))
"""
    assert alone(code) == ["True"] * 4 * 2 * (1 + 4 + 1 + 2)


def test_chunked_is_cross_entropy_block_by_block() -> None:
    """50 rows in blocks of 7: float32 beside float64, and never more logits at once than a block's."""
    code = f"""{AUTOGRAD}
bench_variants.CPU_CHUNK = 7 * 50
seen, whole = [], F.cross_entropy
def counted(logits, *rest, **options):
    seen.append(len(logits))
    return whole(logits, *rest, **options)
for problem in problems(50):
    chunked = bench.Variant("chunked", problem)
    bench_variants.functional.cross_entropy = counted
    chunked.both(1)
    bench_variants.functional.cross_entropy = whole
    loss, gradients = autograd(problem, 1)
    print(max(seen), len(seen) // (problem.directions * 16), abs(chunked.forward(1).item() - loss) < 1e-5, *(
        torch.allclose(leaf.grad.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
        for leaf, wanted in zip(problem.leaves(1), gradients, strict=True)))
    seen.clear()
"""
    # Eight blocks a direction, forward and once more in backward.
    assert alone(code) == (["7", "1"] + ["True"] * 5) * 2 + (["7", "1"] + ["True"] * 3) * 2


def test_the_floor_of_an_h100() -> None:
    """800 TFLOP/s and 3.0 TB/s, 768 -> 512 -> 128, bf16: 42 µs at B 4096, 5.9 ms at 65,536, 89 ms at 262,144."""
    code = """
limits = bench.Ceilings(3.0e12, 800e12)
for rows in (4096, 65536, 262144):
    print(bench_timing.floor_ms("adapter_info_nce", bench.Shape(rows, 768, 512, 128), 1, "both", 2, limits))
"""
    assert [float(value) for value in alone(code)] == pytest.approx([0.042, 5.9, 89], rel=0.02)


def test_peak_bytes_follows_what_is_alive() -> None:
    def block(size: int) -> torch.Tensor:
        return torch.empty(size * MIB // 4)

    def one_after_another() -> None:
        first, second = block(5), block(3)
        del first
        third = block(4)
        del second, third

    assert peak_bytes(one_after_another) == 8 * MIB
    assert peak_bytes(lambda: [block(2) for _ in range(3)]) == 6 * MIB
    assert peak_bytes(lambda: [block(2).sum() for _ in range(3)]) < 3 * MIB
    assert peak_bytes(lambda: None) == 0


def test_peak_bytes_sees_the_backward_pass() -> None:
    weight = torch.ones(256, 1024, requires_grad=True)  # 1 MiB
    # exp keeps its result and gives another of the same size on the way back; the upstream ones and the sum are small
    peak = peak_bytes(lambda: weight.exp().sum().backward())
    assert 2 * MIB <= peak < 2 * MIB + 4096
