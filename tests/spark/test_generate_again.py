"""`kellm generate-spark` a second time: whose folders it replaces, when it publishes, which settings it refuses."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from kellm_features.errors import ConfigError, DataError, EngineError
from kellm_features.settings import load_settings
from kellm_spark.descriptions import GenerateJob, run_generate_job
from kellm_spark.descriptions import job as job_module
from kellm_spark.descriptions.job import _with_model_path
from kellm_spark.descriptions.tables import read_items
from kellm_spark.storage import MANIFEST

from ..knowledge.llm_server import MODEL, LlmServer  # noqa: TID252 - tests are no package with a name of its own

pytestmark = pytest.mark.spark

TEMPLATE = load_settings(None, ["generate.engine=template"])


def closed_book(titles: list[str], out: Path, work: Path | None = None, shards: int | None = None) -> GenerateJob:
    items = out.with_name("items.parquet")
    pq.write_table(pa.table({"item_id": range(len(titles)), "title": titles}), items)
    return GenerateJob("item", {"items": str(items)}, str(out), str(work) if work else None, shards)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_a_folder_of_the_same_job_is_replaced(spark, tmp_path: Path) -> None:
    titles = [f"Film {i}" for i in range(6)]
    out, work, foreign = (tmp_path / "Früher einmal" / name for name in ("alle Texte", "späte Arbeit", "foreign"))
    foreign.mkdir(parents=True)
    run_generate_job(spark, closed_book(titles, out, work, shards=2), TEMPLATE)
    (foreign / "thesis.txt").write_text("years of work")
    before = files(foreign)
    manifests = [{"side": "item", "work": str(out)}, {"side": "user", "work": str(work)}, ["no job"]]
    for told in (None, "no JSON", *map(json.dumps, manifests)):
        if told is not None:
            (foreign / MANIFEST).write_text(told)
        with pytest.raises(DataError, match="foreign exists; remove it"):
            run_generate_job(spark, closed_book(titles, foreign, work), TEMPLATE)
        (foreign / MANIFEST).unlink(missing_ok=True)
    assert files(foreign) == before
    titles[2] = "Another name"
    again = run_generate_job(spark, closed_book(titles, out, work), TEMPLATE)
    assert (again["rows"], again["shards_skipped"]) == (6, 1)
    texts = ds.dataset(out, format="parquet").to_table().to_pylist()
    assert [row["item_id"] for row in texts] == list(range(6))
    assert "Another name" in texts[2]["description"]


def test_a_table_that_has_outgrown_its_shards_is_refused(
    spark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "ROWS_PER_SHARD", 2)
    out, few, many = tmp_path / "out", ["Film"] * 2, ["Film"] * 17
    assert run_generate_job(spark, closed_book(few, out), TEMPLATE)["shards"] == 1
    before = files(out) | files(tmp_path / "out.work")
    with pytest.raises(ConfigError, match=r"out\.work has 1 shards, and 17 rows .* or accept it with --shards 1"):
        run_generate_job(spark, closed_book(many, out), TEMPLATE)
    assert files(out) | files(tmp_path / "out.work") == before
    assert run_generate_job(spark, closed_book(many, out, shards=1), TEMPLATE)["rows"] == 17


def test_a_run_in_which_nothing_was_answered_publishes_nothing(spark, tmp_path: Path) -> None:
    titles, out = [f"Film {i}" for i in range(4)], tmp_path / "out"

    def run(*faults: str) -> int:
        with LlmServer(faults) as server:
            told = ["engine=openai", f"model={MODEL}", f"server.base_url={server.base_url}", "max_failures=3"]
            settings = load_settings(None, [f"generate.{pair}" for pair in told])
            return run_generate_job(spark, closed_book(titles, out, shards=2), settings)["dead_letters"]

    with pytest.raises(EngineError, match=r"nothing was generated in this run, and 4 requests failed, one with: .*400"):
        run("400")
    assert not out.exists()
    assert run("400,contains=Film 2") == 1
    assert run("400") == 1  # one that always fails stops nothing
    before = files(out)
    titles[:2] = ["Another", "And another"]
    with pytest.raises(EngineError, match="3 requests"):
        run("400")
    assert files(out) == before
    assert run() == 0


def test_years_that_are_none_are_named(spark, tmp_path: Path) -> None:
    def years(*told: str) -> list[int | None]:
        with (tmp_path / "items.csv").open("w", newline="") as handle:
            csv.writer(handle).writerows([("item_id", "title", "year"), *((i, "A", y) for i, y in enumerate(told))])
        return [row["year"] for row in read_items(spark, str(tmp_path / "items.csv")).sort("item_id").collect()]

    assert years("1990", "", "-44") == [1990, None, -44]
    with pytest.raises(DataError, match=r"year is 'c\. 1990' of item 1, and no whole number in 2 rows"):
        years("1990", "c. 1990", "", "199O")
    with pytest.raises(DataError, match="year is '99999999999' of item 0"):
        years("99999999999")


def test_settings_that_this_job_does_not_read(spark, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    titles, out = ["A", "B", "C"], tmp_path / "out"
    with pytest.raises(ConfigError, match=r"resume is false: to forget finished texts remove .*/out\.work"):
        run_generate_job(spark, closed_book(titles, out), load_settings(None, ["generate.resume=false"]))
    assert not out.with_name("out.work").exists()
    words = ["generate.engine=template", "generate.limit=2", "generate.user_limit=1"]
    with caplog.at_level(logging.WARNING):
        assert run_generate_job(spark, closed_book(titles, out), load_settings(None, words))["rows"] == 3
        run_generate_job(spark, closed_book(titles, out), TEMPLATE)
    told = [record.getMessage() for record in caplog.records if record.name == job_module.__name__]
    assert [text.partition(",")[0] for text in told] == ["generate.limit is 2"]


def test_a_model_beside_the_driver_is_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def model(*words: str) -> str:
        return _with_model_path(load_settings(None, [f"generate.{word}" for word in words])).generate.model

    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model("engine=vllm", "model=org/name") == str(tmp_path / "org" / "name")
    assert model("engine=vllm", "model=org/other") == "org/other"
    assert model("engine=openai", "model=org/name") == "org/name"  # a server's name for it
