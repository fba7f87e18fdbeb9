"""Who may import whom, checked in the source and in a fresh interpreter."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GROUND = {
    f"kellm_features.{name}"
    for name in "errors schemas sections settings artifacts stages progress resources java overrides".split()
} | {"kellm_features"}
HEAVY = ("torch", "vllm", "feast", "pyspark", "transformers", "pandas", "openai")


BEYOND = {
    ("spark_jobs", "kellm_spark", "publish.py"): ("kellm_features.store",),
    ("spark_jobs", "kellm_spark", "descriptions"): ("kellm_features.knowledge", "kellm_features.data"),
    ("kellm_features", "training", "launch.py"): ("kellm_spark.session",),
}
"""Jobs that run on Spark what also runs without it, and what they import for that; and a training that Spark starts."""


def ours(path: Path) -> set[str]:
    """The project's modules that a file imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "kellm_features"}
    return {name for name in found if name.startswith("kellm_") and name != "kellm_features.__version__"}


def allowed(name: str, prefixes: tuple[str, ...]) -> bool:
    return name in GROUND or name.startswith(prefixes)


@pytest.mark.parametrize(
    ("folder", "may_import"),
    [
        ("kernels/kellm_kernels", ("kellm_kernels",)),
        ("spark_jobs/kellm_spark", ("kellm_spark",)),
        ("kellm_features/data", ("kellm_features.data",)),
        ("kellm_features/knowledge", ("kellm_features.knowledge", "kellm_features.data")),
        ("kellm_features/training", ("kellm_features.training", "kellm_features.data", "kellm_kernels")),
        ("kellm_features/store", ("kellm_features.store",)),
        (
            "kellm_features/evaluation",
            (
                *(f"kellm_features.{name}" for name in ("evaluation", "training", "knowledge", "data", "pipeline")),
                *("kellm_features.report", "kellm_features.store.layout", "kellm_spark.swing", "kellm_kernels"),
            ),
        ),
    ],
)
def test_layers(folder: str, may_import: tuple[str, ...]) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        more = BEYOND.get(path.relative_to(ROOT).parts[:3], ())
        wrong = {name for name in ours(path) if not allowed(name, (*may_import, *more))}
        if folder == "kernels/kellm_kernels":
            wrong |= {name for name in ours(path) if name.startswith("kellm_features")}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_ground_floor_imports_nothing_above_it() -> None:
    for name in sorted(GROUND - {"kellm_features"}):
        module = ROOT / name.replace(".", "/")
        for path in sorted(module.glob("*.py")) or [module.with_suffix(".py")]:
            assert all(found in GROUND or found.startswith("kellm_features.sections.") for found in ours(path)), path


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import kellm_features", HEAVY),
        ("import kellm_spark, kellm_features.settings, kellm_features.schemas, kellm_features.pipeline", HEAVY),
        ("import kellm_features.cli.app, kellm_features.cli.run, kellm_features.cli.fetch", HEAVY),
        ("import kellm_features.cli.doctor, kellm_features.cli.init", HEAVY),
        ("import kellm_features.store.rollout, kellm_features.cli.rollout, kellm_features.store.distributed", HEAVY),
        ("from kellm_features import EmbeddingReader; import kellm_features.store.backends.redis", HEAVY),
        ("import kellm_features.store.join, kellm_features.store.http, kellm_features.cli.serve", HEAVY),
        ("import kellm_features.store.views, kellm_features.store.redis", ("vllm", "pyspark")),  # Feast imports torch
    ],
)
def test_light_things_stay_light(statement: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys; {statement}; print([name for name in {heavy!r} if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.strip() == "[]"
