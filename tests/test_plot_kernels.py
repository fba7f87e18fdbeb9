"""Tables and picture of kernels/README.md: those of the committed rows, and right on rows worked by hand."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
HEADER = (
    "date op directions impl mode method B D H E columns dtype device torch triton commit p20_ms p50_ms p80_ms cpu_ms "
    "peak_mib floor_ms share_of_floor copy_gb_s matmul_tflop_s rounds error"
).split()
ALIKE = {
    "date": "2026-01-02",
    "op": "info_nce",
    "directions": 1,
    "mode": "both",
    "method": "wall",
    "D": 768,
    "H": 512,
    "E": 128,
    "dtype": "float32",
    "device": "a device",
    "torch": "2.13.0",
    "triton": "3.9.0",
    "commit": "abc1234",
    "share_of_floor": 0.5,
    "copy_gb_s": 20,
    "matmul_tflop_s": 0.2,
}
MEMORY = "OutOfMemoryError: CUDA out of memory. Tried to allocate 64 GiB."
SVG = "{http://www.w3.org/2000/svg}"
Rows = list[dict[str, Any]]
Write = Callable[[Rows], Path]


def row(impl: str, batch: int, p50_ms: float | str = "", method: str = "wall", **others: Any) -> dict[str, Any]:
    return ALIKE | {"impl": impl, "B": batch, "p50_ms": p50_ms, "method": method} | others


def failed(impl: str, batch: int, error: str, method: str = "") -> dict[str, Any]:
    return row(impl, batch, method=method, share_of_floor="", error=error)


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        names = {"pages": "page_tables", "rows": "kernel_rows", "tables": "tabulate_kernels", "plot": "plot_kernels"}
        yield SimpleNamespace(**{name: import_module(module) for name, module in names.items()})


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def one(rows: Rows) -> Path:
        path = tmp_path / "rows.csv"
        with path.open("w", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(
                handle, [*HEADER, *(["grad_error"] if any("grad_error" in r for r in rows) else [])]
            )
            writer.writeheader()
            writer.writerows(rows)
        return path

    return one


def table_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]


def test_the_page_is_made_from_the_rows(scripts: SimpleNamespace) -> None:
    page = scripts.tables.PAGE.read_text(encoding="utf-8")
    files = {match[4] for match in scripts.pages.BLOCK.finditer(page)}
    assert files == {scripts.rows.CPU_ROWS, scripts.rows.GPU_ROWS}
    assert scripts.tables.written(page) == page, "run python benchmarks/tabulate_kernels.py"


def test_the_picture_is_made_from_the_rows(scripts: SimpleNamespace) -> None:
    drawn = scripts.plot.draw(scripts.plot.chosen(scripts.rows.read_rows(scripts.plot.source())))
    assert scripts.plot.PICTURE.read_text(encoding="utf-8") == drawn, "run python benchmarks/plot_kernels.py"


def test_what_the_page_says_of_a_cpu(scripts: SimpleNamespace) -> None:
    rows = scripts.rows.read_rows(scripts.pages.DATA / f"{scripts.rows.CPU_ROWS}.csv")
    step, loss = (scripts.rows.Timings(group, rows) for group in scripts.rows.groups(rows))

    def ms(timings: Any, impl: str, batch: int) -> float:
        return float(timings.main(impl, batch).p50_ms)

    assert step.batches == [256, 1024, 4096]
    for batch in step.batches:
        assert min(step.impls, key=lambda impl: ms(step, impl, batch)) == "compile"
        assert 1.095 <= ms(step, "ours_torch", batch) / ms(step, "compile", batch) < 1.295
    assert sorted(step.impls, key=lambda impl: ms(step, impl, 4096))[:2] == ["compile", "ours_torch"]
    assert min(step.impls, key=lambda impl: step.known(impl, 4096, "peak_mib")) == "ours_torch"
    assert sorted(step.impls, key=lambda impl: ms(step, impl, 256))[-2:] == ["ours_torch", "st_cached_mnrl"]
    assert max(step.impls, key=lambda impl: step.known(impl, 256, "peak_mib")) == "ours_torch"
    assert 0.4 < ms(loss, "eager", 256) / ms(loss, "ours_torch", 256) < 0.5


def test_ratios_the_best_and_the_last_row(scripts: SimpleNamespace, write: Write) -> None:
    rows = [
        row("ours_torch", 256, 99, commit="0000000"),  # measured again below
        row("eager", 256, 2, peak_mib=3),
        row("ours_torch", 256, 4, peak_mib=5.5),
        row("ours_torch", 256, 3, mode="forward"),
        row("ours_torch", 1024, 8.0, peak_mib=5, share_of_floor=0.25),
        row("eager", 1024, 1234.4, peak_mib=70),
        row("compile", 1024, 7.996, peak_mib=1500),
        failed("st_mnrl", 1024, MEMORY),
        failed("inf_cl", 256, "ValueError: loss 2, expected 1: not timed"),
    ]
    text = scripts.tables.times(scripts.rows.read_rows(write(rows)))
    assert text.splitlines()[0] == (
        "**`info_nce`, anchor to positive, E 128**: wall clock; a device; float32; torch 2.13.0; triton 3.9.0; "
        'commit abc1234; 2026-01-02; `impl="auto"`: `torch`.'
    )
    assert table_lines(text) == [
        "| ms | B 256 | B 1,024 |",
        "| ours, PyTorch | 4.00 | 8.00 |",
        "| PyTorch, eager | **2.00** (0.50×) | 1,234 (154.3×) |",
        "| torch.compile | — | **8.00** (1.00×) |",
        "| sentence-transformers | — | out of memory |",
        "| Inf-CL | — | — |",
        "| share of the roofline, ours | 50% | 25% |",
        "| peak MiB, ours | 5.50 | **5.00** |",
        "| peak MiB, others | **3.00** | 70.0 – 1,500 |",
    ]
    assert "\nInf-CL at B 256: ValueError: loss 2, expected 1: not timed.\n" in text


def test_on_a_gpu_graphs_for_small_batches_then_events_and_calls_by_the_clock(
    scripts: SimpleNamespace, write: Write
) -> None:
    rows = [
        *(row("ours_triton", 4096, ms, how) for how, ms in (("events", 0.2), ("wall", 0.3), ("graph", 0.1))),
        *(row("compile", 4096, ms, how) for how, ms in (("events", 0.9), ("wall", 0.25), ("graph", 0.4))),
        *(row("compile_reduce_overhead", 4096, ms, how) for how, ms in (("events", 0.3), ("wall", 0.5))),
        *(row("st_cached_mnrl", 4096, ms, how) for how, ms in (("events", 5), ("wall", 6))),
        failed("st_cached_mnrl", 4096, "RuntimeError: no capture", "graph"),
        row("ours_triton", 16384, 1, "events", grad_error=0.0021),
        row("compile", 16384, 2, "events", grad_error=0.04),
    ]
    text = scripts.tables.times(scripts.rows.read_rows(write(rows)))
    assert "E 128**: replay of a CUDA graph up to B 4,096, CUDA events above; a device;" in text
    assert '`impl="auto"`: `triton`.' in text
    assert table_lines(text) == [
        "| ms | B 4,096 | B 16,384 |",
        "| ours, Triton | **0.100** | **1.00** |",
        "| torch.compile | 0.400 (4.00×) | 2.00 (2.00×) |",
        "| torch.compile, reduce-overhead | 0.300 (3.00×) | — |",
        "| sentence-transformers, cached | — | — |",
        "| share of the roofline, ours | 50% | 50% |",
        "| gradients' error, ours | — | **2.1e-3** |",
        "| gradients' error, others | — | 4.0e-2 |",
        "| ms of a call by the clock | B 4,096 |",
        "| ours, Triton | 0.300 |",
        "| torch.compile | **0.250** (0.83×) |",
        "| torch.compile, reduce-overhead | 0.500 (1.67×) |",
        "| sentence-transformers, cached | 6.00 (20.0×) |",
    ]
    assert (
        "\ntorch.compile, reduce-overhead at B 4,096: CUDA events; "
        "sentence-transformers, cached at B 4,096: RuntimeError: no capture.\n"
    ) in text


@pytest.mark.parametrize("failed_last", [True, False])
def test_a_failure_counts_until_the_next_figure(scripts: SimpleNamespace, write: Write, failed_last: bool) -> None:
    figures = [row("eager", 256, 2, "events", peak_mib=7), row("eager", 256, 1, "graph")]
    failure = [failed("eager", 256, MEMORY)]
    ours = [row("ours_triton", 256, 1, "graph"), row("ours_triton", 256, 1, "events", peak_mib=9)]
    rows = scripts.rows.read_rows(write([*ours, *(figures + failure if failed_last else failure + figures)]))
    lines = table_lines(scripts.tables.times(rows))
    assert lines[2] == (
        "| PyTorch, eager | out of memory |" if failed_last else "| PyTorch, eager | **1.00** (1.00×) |"
    )
    peaks = ["| peak MiB, ours | **9.00** |"]
    if not failed_last:
        peaks = ["| peak MiB, ours | 9.00 |", "| peak MiB, others | **7.00** |"]
    assert [line for line in lines if "peak" in line] == peaks


def test_auto_is_pytorch_where_triton_refuses(scripts: SimpleNamespace, write: Write) -> None:
    rows = [
        failed("ours_triton", 256, "ValueError: impl='triton' cannot compute this"),
        row("ours_torch", 256, 2, "events"),
        row("eager", 256, 1, "events"),
    ]
    lines = table_lines(scripts.tables.times(scripts.rows.read_rows(write(rows))))
    assert lines[1:4] == [
        "| ours, PyTorch | 2.00 |",
        "| ours, Triton | — |",
        "| PyTorch, eager | **1.00** (0.50×) |",
    ]


def test_all_problems_and_devices_of_a_file_or_one(scripts: SimpleNamespace, write: Write) -> None:
    rows = scripts.rows.read_rows(
        write(
            [
                row("ours_torch", 256, 1, op=op, directions=directions, device=device)
                for device in ("first & one", "second")
                for directions in (2, 1)
                for op in ("info_nce", "adapter_info_nce")
            ]
        )
    )
    every = scripts.tables.times(rows)
    assert re.findall(r"^\*\*`(\w+)`, (anchor|both)", every, re.MULTILINE) == [
        (op, side) for op in ("adapter_info_nce", "info_nce") for side in ("anchor", "both") for _ in range(2)
    ]
    assert re.findall(r"<details><summary>(.*?)</summary>\n\n", every)[-1] == "info_nce, both directions, E 128, second"
    assert every.count("<details>") == every.count("</details>") == 7
    assert "768 → 512 → 128, first &amp; one" not in every.split("<details>")[0]
    some = scripts.tables.times(rows, *"adapter_info_nce 2 768 512 128".split())
    assert some.count("**`adapter_info_nce`, both directions, 768 → 512 → 128**") == 2
    assert "<details>" not in some


def test_a_gpu_that_has_not_been_met_yet(scripts: SimpleNamespace, tmp_path: Path) -> None:
    assert scripts.tables.read(tmp_path / "adapter_info_nce.csv") is None
    assert "(../benchmarks/GPU.md)" in scripts.tables.times(None)


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("no tables", "the page has no marker of a table; put <!-- table NAME"),
        ("<!-- table times of rows -->\n<!-- end -->", "marker '<!-- table times of rows -->': mend it to the form"),
        (
            "<!-- table times from a -->\n<!-- table times from b -->\n<!-- end -->",
            "marker '<!-- table times from b -->': mend it to the form .*, or close the one before it",
        ),
        ("<!-- table all from a -->\n<!-- end -->", "names the table 'all'; there are: times"),
        (
            "<!-- table times from a -->\n<!-- end -->",
            r"a\.csv is not in .*; run benchmarks/bench_adapter_info_nce\.py",
        ),
        (
            "<!-- table times info_nce 7 1 1 1 from adapter_info_nce_cpu -->\n<!-- end -->",
            "no rows of info_nce 7 1 1 1; OP DIRECTIONS D H E with rows: adapter_info_nce 1 768 512 128, info_nce",
        ),
    ],
)
def test_what_is_wrong_with_a_page_is_told(scripts: SimpleNamespace, page: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scripts.tables.written(page)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"p50_ms": "fast"}, "p50_ms is 'fast', not a positive number"),
        ({"p50_ms": ""}, "p50_ms is '', not a positive number"),
        ({"p50_ms": 0}, "p50_ms is '0', not a positive number"),
        ({"copy_gb_s": "nan"}, "copy_gb_s is 'nan', not a positive number"),
        ({"peak_mib": "-1"}, "peak_mib is '-1', not a positive number"),
        ({"B": "256.5"}, r"B is '256\.5', not a whole number"),
        ({"method": "cuda"}, "method is 'cuda'; accepted: wall, graph, events"),
        ({"method": ""}, "method is ''; accepted: wall, graph, events"),
    ],
)
def test_what_is_wrong_with_a_row_is_told(
    scripts: SimpleNamespace, write: Write, wrong: dict[str, Any], message: str
) -> None:
    path = write([row("eager", 256, 1), row("eager", 1024, 1) | wrong])
    with pytest.raises(ValueError, match=rf"rows\.csv, line 3: {message}; mend the row, or .* measure it again"):
        scripts.rows.read_rows(path)


def test_a_column_that_is_missing_is_told(scripts: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("op,error\ninfo_nce,\n")
    with pytest.raises(ValueError, match="no column method"):
        scripts.rows.read_rows(path)


def drawn(scripts: SimpleNamespace, path: Path) -> ElementTree.Element:
    return ElementTree.fromstring(scripts.plot.draw(scripts.plot.chosen(scripts.rows.read_rows(path))))


def texts(picture: ElementTree.Element, kind: str) -> dict[str, tuple[float, float]]:
    found = (text for text in picture.iter(f"{SVG}text") if text.get("class") == kind)
    return {text.text or "": (float(text.get("x", "")), float(text.get("y", ""))) for text in found}


def test_points_stand_at_their_flops_per_byte_and_flops_a_second(scripts: SimpleNamespace, write: Write) -> None:
    # The loss alone in float32: 8·B²·E FLOPs and 24·B·E bytes. At B = 300 that is 100 FLOPs per byte and 92.16 MFLOP.
    rows = [
        row("ours_torch", 300, 0.9216),  # 100 GFLOP/s
        row("eager", 300, 1.8432),  # 50
        row("ours_torch", 3000, 92.16),  # 100, at 1000 FLOPs per byte
        failed("eager", 3000, MEMORY),
    ]
    picture = drawn(scripts, write(rows))
    label = picture.get("aria-label", "")
    assert "a device. Roof: matrix product 200 GFLOP/s, copy 20.0 GB/s. In GFLOP/s: " in label
    assert label.endswith("ours, PyTorch 100 at B 300, 100 at B 3,000; PyTorch, eager 50.0 at B 300.")
    marks = {group.get("class", "").split()[0]: group for group in picture.iter(f"{SVG}g") if group.get("class")}
    at = {
        impl: [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in marks[impl].iter(f"{SVG}circle")]
        for impl in marks
    }
    ticks = {(text.text, text.get("text-anchor")): text for text in picture.iter(f"{SVG}text")}

    def x(words: str) -> float:
        return float(ticks[words, "middle"].get("x", ""))

    def y(words: str) -> float:
        return float(ticks[words, "end"].get("y", "")) - 4  # its words stand that much lower

    assert at["ours_torch"] == [(x("100"), y("100")), (x("1,000"), y("100"))]
    assert at["eager"] == [(x("100"), y("50"))]
    assert [x("300"), x("3,000")] == [x("100"), x("1,000")]  # each B beneath its points
    roof = next(line for line in picture.iter(f"{SVG}polyline") if line.get("class") == "roof")
    _, ridge, end = (tuple(map(float, point.split(","))) for point in roof.get("points", "").split())
    assert ridge == (x("10"), y("200"))  # 200 GFLOP/s over 20 GB/s
    assert end[1] == ridge[1]


def test_names_of_all_implementations_keep_apart(scripts: SimpleNamespace, write: Write) -> None:
    impls = list(scripts.rows.LABELS)
    rows = [row(impl, b, b * (1 + i / 1000), device="a <b> & c") for i, impl in enumerate(impls) for b in (256, 1024)]
    picture = drawn(scripts, write(rows))
    places = sorted(y for _, y in texts(picture, "name").values())
    assert len(places) == len(impls)
    assert min(below - above for above, below in pairwise(places)) >= scripts.plot.LINE - 0.2
    assert places[0] >= scripts.plot.TOP
    assert places[-1] <= scripts.plot.BOTTOM + 4
    assert "a <b> & c" in picture.get("aria-label", "")
    light, dark = (picture.findtext(f"{SVG}style") or "").split("@media (prefers-color-scheme: dark)")
    for impl in impls:
        assert f".{impl} {{ color: " in light
        assert f".{impl} {{ color: " in dark


def test_labels_near_the_edge_are_moved_inside(scripts: SimpleNamespace) -> None:
    assert scripts.plot.spread([50, 10, 12, 100], 0, 100) == [50, 10, 26, 100]
    assert scripts.plot.spread([99, 98, -5], 0, 100) == [100, 84, 0]


def test_the_device_measured_last_is_drawn(scripts: SimpleNamespace, write: Write) -> None:
    rows = [
        row("ours_torch", 256, 1, op=op, device=device) for device in "ab" for op in ("info_nce", "adapter_info_nce")
    ]
    group = scripts.plot.chosen(scripts.rows.read_rows(write(rows))).group
    assert (group.op, group.device) == ("adapter_info_nce", "b")


def test_nothing_to_draw_and_unknown_dtypes_are_told(scripts: SimpleNamespace, write: Write) -> None:
    with pytest.raises(ValueError, match="nothing was timed of `info_nce`, anchor to positive, E 128 on a device"):
        drawn(scripts, write([failed("eager", 256, MEMORY)]))
    with pytest.raises(ValueError, match=r"dtype 'int8' has no size here; add it to ITEM_BYTES of plot_kernels\.py"):
        drawn(scripts, write([row("eager", 256, 1, dtype="int8")]))


def test_the_scripts_need_no_torch() -> None:
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import plot_kernels; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"
