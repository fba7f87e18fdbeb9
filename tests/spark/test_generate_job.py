"""`kellm generate-spark`: the stage's texts row by row; each prompt asked once; what is left over or refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from kellm_features.data.history import assign_roles
from kellm_features.errors import ConfigError, DataError, EngineError, KellmError, SchemaError
from kellm_features.schemas import DEAD_LETTERS, ITEM_DESCRIPTIONS, USER_DESCRIPTIONS
from kellm_features.settings import Settings, load_settings
from kellm_spark.descriptions import GenerateJob, run_generate_job
from kellm_spark.descriptions.histories import histories
from kellm_spark.descriptions.tables import in_shards
from kellm_spark.storage import MANIFEST

from ..knowledge.llm_server import MODEL, LlmServer  # noqa: TID252 - tests are no package with a name of its own
from .films import Films, link

pytestmark = pytest.mark.spark

SHARDS = 5


def odd_text(i: int) -> str:
    """Ids whose order differs between bytes, case folding and numbers."""
    return [f"{i}", f"é{i}", f"Z{i}", f"z {i}", f"\U0001f3ac{i}"][i % 5]


def template(*overrides: str) -> Settings:
    return load_settings(None, ["generate.engine=template", "history.max_events=4", *overrides])


def asking(server: LlmServer, *overrides: str) -> Settings:
    told = [f"generate.server.base_url={server.base_url}", f"generate.model={MODEL}", *overrides]
    return template("generate.engine=openai", "generate.server.concurrency=2", *told)


def job(films: Films, side: str = "item", **more: Any) -> GenerateJob:
    return GenerateJob(side, films.inputs(side), str(films.root / f"{side}s"), **{"shards": SHARDS, **more})


def rows(folder: Path | str) -> list[dict[str, Any]]:
    """In the table's own order of files and rows."""
    return ds.dataset(folder, format="parquet").to_table().to_pylist()


def letters(films: Films) -> list[dict[str, Any]]:
    table = ds.dataset(films.root / "items" / "_dead_letters", format="parquet").to_table()
    DEAD_LETTERS.check(table.schema, "dead letters")
    return table.to_pylist()


@pytest.fixture
def films(tmp_path: Path) -> Films:
    return Films(tmp_path).write()


@pytest.mark.parametrize("id_of", [int, odd_text])
def test_texts_are_those_of_the_stage(spark, tmp_path: Path, id_of: Callable[[int], Any]) -> None:
    films = Films(tmp_path, id_of=id_of).write()
    settings = template("generate.factors=true", "data.split=time", "generate.max_tokens=60")
    (tmp_path / "ingest" / "manifest.json").write_text(json.dumps({"split_hash": "abc"}))
    told = {side: run_generate_job(spark, job(films, side), settings) for side in ("item", "user")}
    stage = films.stage(settings)
    for side, schema in (("item", ITEM_DESCRIPTIONS), ("user", USER_DESCRIPTIONS)):
        wanted = pq.read_table(stage / f"{side}_descriptions.parquet").to_pylist()
        assert rows(tmp_path / f"{side}s") == wanted  # prompt hashes, factors and grounding among them
        schema.check(ds.dataset(tmp_path / f"{side}s").schema, side)
        manifest = json.loads((tmp_path / f"{side}s" / MANIFEST).read_text())
        assert manifest == told[side]
        assert (manifest["rows"], manifest["by_source"]) == (len(wanted), {"template": len(wanted)})
        assert (manifest["domain"], manifest["engine"], manifest["shards"]) == ("movies", "template", SHARDS)
    assert (told["item"]["split_hash"], told["user"]["split_hash"]) == (None, "abc")
    assert any(row["grounding"] is not None for row in rows(tmp_path / "items"))


@pytest.mark.parametrize("split", ["user", "time"])
def test_histories_do_not_depend_on_how_the_users_are_parted(spark, films: Films, split: str) -> None:
    settings = template(f"data.split={split}")
    path = films.root / "ingest" / "interactions.parquet"
    roles = assign_roles(pq.read_table(path).to_pandas(), split=split, max_history=4, seed=settings.run.seed)
    known = roles[roles["role"].eq("history")]
    wanted = list(zip(known["user_id"], known["position"], known["item_id"], strict=True))
    frame = spark.read.parquet(str(path)).repartition(3, "item_id")
    for rows_per_part in (1, 13, 1000):
        found = histories(frame, settings, rows_per_part).sort("user_id", "position").collect()
        assert [(row["user_id"], row["position"], row["item_id"]) for row in found] == wanted


def test_an_id_keeps_its_shard_and_a_shard_is_one_task(spark) -> None:
    from pyspark.sql import functions as sf

    def numbers(count: int) -> dict[int, tuple[int, int]]:
        frame = in_shards(spark.range(count).withColumnRenamed("id", "item_id"), "item_id", 7)
        told = frame.withColumn("task", sf.spark_partition_id()).collect()
        return {row["item_id"]: (row["shard"], row["task"]) for row in told}

    few, many = numbers(50), numbers(500)
    assert all(many[key] == few[key] for key in few)
    assert len(set(many.values())) == 7  # as many pairs of shard and task as shards
    assert {shard for shard, _ in many.values()} == set(range(7))


def test_every_prompt_is_asked_once_and_an_unchanged_one_never_again(spark, films: Films) -> None:
    with LlmServer() as server:
        settings = asking(server)
        first = run_generate_job(spark, job(films), settings)
        assert len(server.requests) == first["generated"] == films.items
        assert set(server.asked.values()) == {1}
        assert (first["models"], first["shards_skipped"]) == ({MODEL: "unversioned"}, 0)
        texts = rows(films.root / "items")
        assert sum(row["prompt_tokens"] for row in texts) == first["prompt_tokens"] > 0

        again = run_generate_job(spark, job(films, shards=None), settings)
        assert (again["generated"], again["shards"], again["shards_skipped"]) == (0, SHARDS, SHARDS)
        assert rows(films.root / "items") == texts
        assert again["completion_tokens"] == first["completion_tokens"]

        films.item_rows[6]["title"] = "Another name"
        changed = run_generate_job(spark, job(films.write()), settings)
        assert (changed["generated"], changed["shards_skipped"]) == (1, SHARDS - 1)
        assert len(server.requests) == films.items + 1
        assert "Another name" in server.requests[-1].user
        now = rows(films.root / "items")
        assert [old["item_id"] for old, new in zip(texts, now, strict=True) if old != new] == [6]

        del films.item_rows[6], films.links[films.links.index(link(6, 106, 1.0))]
        films.events = []
        gone = run_generate_job(spark, job(films.write()), settings)
        assert (gone["generated"], gone["rows"]) == (0, films.items - 1)


def test_profiles_of_a_server_and_of_short_histories(spark, films: Films) -> None:
    run_generate_job(spark, job(films), template())
    with LlmServer() as server:
        settings = asking(server, "generate.user_engine=openai", "generate.min_history=2")
        told = run_generate_job(spark, job(films, "user"), settings)
    known = Counter(row["user_id"] for row in histories_of(films, settings))
    asked = {user["user_id"] for user in films.user_rows if known[user["user_id"]] >= 2}
    assert 0 < len(asked) < films.users - 1
    assert {row["user_id"] for row in rows(films.root / "users") if row["model_id"] == MODEL} == asked
    assert len(server.requests) == told["generated"] == len(asked)


def histories_of(films: Films, settings: Settings) -> list[dict[str, Any]]:
    frame = pq.read_table(films.root / "ingest" / "interactions.parquet").to_pandas()
    roles = assign_roles(frame, split="user", max_history=settings.history.max_events, seed=settings.run.seed)
    return roles[roles["role"].eq("history")].to_dict("records")


def test_a_failed_request_is_a_dead_letter_and_the_only_one_asked_again(spark, films: Films) -> None:
    with LlmServer(["400,contains=Film 007x"]) as server:
        told = run_generate_job(spark, job(films), asking(server))
    # Items 7 and 6, whose second page is that of film 7.
    failed = [int(letter["id"]) for letter in letters(films)]
    assert 7 in failed
    assert told["dead_letters"] == len(failed) < films.items
    assert told["by_source"]["llm"] == films.items - len(failed)
    assert {letter["model_id"] for letter in letters(films)} == {MODEL}
    assert all("400" in letter["reason"] for letter in letters(films))
    by_id = {row["item_id"]: row for row in rows(films.root / "items")}
    assert len(by_id) == films.items
    assert by_id[7]["description_source"] == "extract"
    with LlmServer(port=server.port) as server:
        told = run_generate_job(spark, job(films), asking(server))
    assert sorted(server.asked.values()) == [1] * len(failed)
    assert (told["dead_letters"], told["by_source"], letters(films)) == (0, {"llm": films.items}, [])


def test_a_server_that_refuses_the_key_ends_the_run_and_keeps_what_was_finished(spark, films: Films) -> None:
    with LlmServer(["401,contains=Film 005x"]) as server:
        with pytest.raises(EngineError, match="answered 401"):  # in one shard: no other task goes on meanwhile
            run_generate_job(spark, job(films, shards=1), asking(server))
        assert not (films.root / "items").exists()
    finished = server.statuses[200]
    with LlmServer(port=server.port) as server:
        told = run_generate_job(spark, job(films, shards=1), asking(server))
    stored = films.items - told["generated"]
    assert finished - 2 <= stored <= finished  # two are in flight at a time
    assert stored > 0
    assert len(server.requests) == told["generated"]
    assert told["by_source"] == {"llm": films.items}


def refused(spark, films: Films, *overrides: str, **more: Any) -> KellmError:
    before = sorted(path for path in films.root.rglob("*"))
    with pytest.raises(KellmError) as error:
        run_generate_job(spark, job(films, **more), template(*overrides))
    assert sorted(path for path in films.root.rglob("*")) == before
    return error.value


def test_what_cannot_be_right_is_refused_before_anything_is_written(spark, films: Films, tmp_path: Path) -> None:
    def told(kind: type[KellmError], words: str, *overrides: str, **more: Any) -> None:
        error = refused(spark, films, *overrides, **more)
        assert type(error) is kind
        assert words in str(error)

    told(ConfigError, "budget_tokens is 5", "generate.budget_tokens=5")
    told(EngineError, "there is no engine 'gpt'", "generate.engine=gpt")
    told(ConfigError, "--shards is 0", shards=0)
    told(ConfigError, "s3://bucket/x.work is not a path", work="s3://bucket/x.work")
    inputs = films.inputs("item")
    for name in ("links", "pages"):
        given = GenerateJob("item", {k: v for k, v in inputs.items() if k != name}, str(tmp_path / "items"))
        with pytest.raises(ConfigError, match=f"--{name} is missing"):
            run_generate_job(spark, given, template())
    given = GenerateJob("user", inputs, str(tmp_path / "items"))
    with pytest.raises(ConfigError, match=r"--users is missing.*--links is not read"):
        run_generate_job(spark, given, template())
    with pytest.raises(DataError, match=r"PATH_NOT_FOUND.*out: "):
        run_generate_job(spark, GenerateJob("item", {"items": "none.parquet"}, str(tmp_path / "items")), template())

    films.links.append(link(3, 4711, 1.0))
    films.write()
    told(DataError, "page 4711, to which an item is linked, is not there")
    films.links.pop()
    films.pages.append(films.pages[3])
    films.write()
    told(DataError, "page 103, to which an item is linked, stands twice")
    films.pages.pop()
    films.item_rows.append(films.item_rows[2])
    films.write()
    told(DataError, f"{films.items + 1} rows hold {films.items} different item_id")
    films.item_rows.pop()
    films.write()
    (tmp_path / "items").mkdir()
    told(DataError, "exists; remove it")
    (tmp_path / "items").rmdir()
    Films(tmp_path / "other", id_of=str).write()
    with pytest.raises(SchemaError, match="item_id is string, and bigint in items"):
        run_generate_job(
            spark,
            GenerateJob("item", {**inputs, "links": str(tmp_path / "other/link")}, str(tmp_path / "x")),
            template(),
        )


def test_users_whose_events_do_not_fit_the_items_are_refused(spark, films: Films) -> None:
    run_generate_job(spark, job(films), template())
    folder = films.root / "items"
    part = next(folder.glob("part-*.parquet"))
    (folder / "part-again.parquet").write_bytes(part.read_bytes())
    assert "stands 2 times; each may stand once" in str(refused(spark, films, side="user"))
    (folder / "part-again.parquet").unlink()
    del films.item_rows[0]
    films.write()
    assert "item 0 is not in the catalogue" in str(refused(spark, films, side="user"))
    assert "holds the work of 5" in str(refused(spark, films, shards=4))
    more = {"work": str(films.root / "items.work")}
    assert "holds the work of --side item, not user" in str(refused(spark, films, side="user", **more))


def test_the_command_says_what_it_did_and_ends_with_3(films: Films) -> None:
    with LlmServer(["400,contains=The title is: The Film 002x"]) as server:
        words = ["--set", f"generate.server.base_url={server.base_url}", "--set", 'spark.master="local[2]"']
        words += ["--items", "ingest/items.parquet", "--links", "link", "--pages", "wiki", "--out", "texts"]
        words += ["--engine", "openai", "--model", MODEL, "--max-tokens", "50", "--shards", "3", "--factors"]
        code = "import kellm_features.cli.generate_spark; from kellm_features.cli import main; main()"
        command = [sys.executable, "-c", code, "generate-spark", "--side", "item", *words]
        done = subprocess.run(command, cwd=films.root, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    told = {" ".join(line.split()[:-1]): line.split()[-1] for line in done.stdout.splitlines() if line.strip()}
    assert (told["items"], told["dead letters"], told["shards"]) == (str(films.items), "1", "3")
    assert told["descriptions:"] == "texts"
    assert {request.body["max_tokens"] for request in server.requests} == {50}
    assert all("response_format" in request.body for request in server.requests)
    assert ds.dataset(films.root / "texts", format="parquet").count_rows() == films.items
