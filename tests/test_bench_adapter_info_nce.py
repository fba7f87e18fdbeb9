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
CPU_IMPLS = ["ours_torch", "eager", "compile", "st_mnrl", "st_cached_mnrl"]
# Runs the script's own functions in a process of their own: the script sets sys.path for itself.
ALONE = "import sys; sys.path.insert(0, {folder!r}); import bench_adapter_info_nce as bench, torch\n{code}"


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def alone(code: str) -> list[str]:
    return run("-c", ALONE.format(folder=str(BENCHMARKS), code=code)).split()


@pytest.mark.slow
def test_a_quick_run_writes_whole_rows_of_every_cpu_variant(tmp_path: Path) -> None:
    out = tmp_path / "data" / "rows.csv"
    script = str(BENCHMARKS / "bench_adapter_info_nce.py")
    printed = run(script, "--quick", "--device", "cpu", "--out", str(out), "--commit", "abc1234")
    with out.open(newline="") as handle:
        reader = csv.DictReader(handle)
        rows = list(reader)
    assert reader.fieldnames == (
        "date op directions impl mode method B D H E columns dtype device torch triton commit p20_ms p50_ms p80_ms "
        "cpu_ms peak_mib floor_ms share_of_floor copy_gb_s matmul_tflop_s rounds error"
    ).split(" ")
    # A variant whose loss or gradients differ from the truth has an error and no other row.
    assert {row["error"] for row in rows} == {""}
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
    eager = next(row for row in rows if (row["op"], row["impl"], row["mode"]) == ("info_nce", "eager", "both"))
    assert float(eager["peak_mib"]) > 2 * 72 * 72 * 4 / MIB  # logits and their gradient at least
    for name in ("ours_triton", "compile_reduce_overhead", "inf_cl", "memeff"):
        assert f"{name} skipped: " in printed
    table = [line.split() for line in printed.splitlines() if line.startswith(("adapter_info_nce ", "info_nce "))]
    assert [line[4] for line in table] == CPU_IMPLS * 2
    assert {tuple(line[6:8] + line[9:10]) for line in table if line[4] == "ours_torch"} == {("1.00", "1.00", "1.00")}


def test_a_second_run_appends_and_both_directions_agree(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    script = str(BENCHMARKS / "bench_adapter_info_nce.py")
    first, second = ["eager"], ["ours_torch", "eager", "st_mnrl", "st_cached_mnrl"]
    for impls in (first, second):
        run(script, "--quick", "--device", "cpu", "--out", str(out), "--directions", "2", "--impls", *impls)
    with out.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["impl"] for row in rows if row["mode"] == "both" and not row["error"]] == first * 2 + second * 2
    assert {row["directions"] for row in rows} == {"2"}
    assert len(rows) == 3 * 2 * (1 + 4)


def test_a_variant_with_another_loss_or_gradient_is_not_timed() -> None:
    code = """
problem = bench.Problem("info_nce", bench.Shape(24, 8, 8, 16), 1, torch.device("cpu"), torch.float32, 2)
truth, gradients = bench.true_loss(problem, 0, 100), bench.true_gradients(problem, 0)
right = bench.Variant("eager", problem)
bench.prepare(right, truth, gradients)
exact = right.loss
for wrong in (lambda a, b: exact(a, b) * 1.01, lambda a, b: exact(a, b.detach()),
              lambda a, b: exact(a, b) * 2 - exact(a, b).detach()):
    right.loss = wrong
    try:
        bench.prepare(right, truth, gradients)
    except ValueError as error:
        print(str(error).split()[0], str(error).split()[-2:] == ["not", "timed"])
"""
    assert alone(code) == ["loss", "True", "a", "True", "gradients", "True"]


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


def test_the_truth_is_cross_entropy_in_blocks_of_any_size() -> None:
    code = """
from torch.nn import functional as F
for op in ("info_nce", "adapter_info_nce"):
    problem = bench.Problem(op, bench.Shape(24, 8, 12, 16), 2, torch.device("cpu"), torch.float32, 1)
    a, b = (problem.embed(v) for v in problem.pool[0])
    logits, own = (a @ b.T / 0.03).double(), torch.arange(24)
    wanted = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    print(*(abs(bench.true_loss(problem, 0, size) - wanted.item()) < 1e-5 for size in (1, 100, 10000)))
"""
    assert alone(code) == ["True"] * 6


def test_the_floor_of_an_h100() -> None:
    """800 TFLOP/s and 3.0 TB/s, 768 -> 512 -> 128, bf16: 42 µs at B 4096, 5.9 ms at 65,536, 89 ms at 262,144."""
    code = """
limits = bench.Ceilings(3.0e12, 800e12)
for rows in (4096, 65536, 262144):
    print(bench.floor_ms("adapter_info_nce", bench.Shape(rows, 768, 512, 128), 1, "both", 2, limits))
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
