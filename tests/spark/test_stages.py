"""The three stages on real tables: what they write, what they report, and what must never reach the pairs."""

from __future__ import annotations

import bz2
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from kellm_features import schemas
from kellm_features.artifacts import Artifact, Manifest
from kellm_features.errors import DataError
from kellm_features.settings import Settings
from kellm_features.stages import StageContext
from kellm_spark.stages import run_link, run_swing, run_wiki, wiki_files


def artifact(path: Path, stage: str) -> Artifact:
    manifest = Manifest(
        stage=stage,
        run_id="r",
        version="0",
        created=datetime.now(UTC),
        config_hash="",
        output_hash="",
    )
    return Artifact(path, manifest)


def context(
    root: Path, name: str, settings: Settings, files: dict[str, Path] | None = None, **inputs: Path
) -> StageContext:
    out = root / name
    out.mkdir()
    return StageContext(
        settings=settings,
        run_dir=root,
        out=out,
        work=root,
        inputs={stage: artifact(path, stage) for stage, path in inputs.items()},
        files=files or {},
        split_hash=None,
    )


def interactions(rows: list[tuple[int, int, bool, str]]) -> pa.Table:
    users, items, liked, split = zip(*rows, strict=True)
    return pa.table(
        {
            "user_id": pa.array(users, pa.int64()),
            "item_id": pa.array(items, pa.int64()),
            "rating": pa.array([None] * len(rows), pa.float32()),
            "liked": pa.array(liked, pa.bool_()),
            "event_timestamp": pa.array([datetime(2020, 1, 1, tzinfo=UTC)] * len(rows), schemas.TIMESTAMP),
            "split": pa.array(split),
        }
    )


TRAIN = [(u, i, (u + i) % 5 > 0, "train") for u in range(12) for i in range(9) if (u * i) % 3]
LATER = [(u, i, True, "valid" if u % 2 else "test") for u in range(12) for i in range(20, 29)]


def swing(
    root: Path, name: str, rows: list[tuple[int, int, bool, str]], **options: Any
) -> tuple[Any, pa.Table, pa.Table]:
    ingest = root / f"{name}-in"
    schemas.write_table(interactions(rows), ingest / "interactions.parquet", schemas.INTERACTIONS)
    ctx = context(root, name, Settings.model_validate({"swing": options}), ingest=ingest)
    report = run_swing(ctx)
    tables = [schemas.read_table(ctx.out / f"{side}_pairs.parquet", schemas.PAIRS) for side in ("item", "user")]
    return report, tables[0], tables[1]


@pytest.mark.spark
def test_swing_uses_liked_train_rows_only(spark, tmp_path: Path) -> None:
    report, items, users = swing(tmp_path, "with", [*TRAIN, *LATER], top_k=5)
    keys = [("anchor_id", "ascending"), ("rank", "ascending")]
    assert items.equals(items.sort_by(keys))
    assert users.equals(users.sort_by(keys))
    assert set(items["neighbor_id"].to_pylist()) <= set(range(9))
    assert report.rows_in == len(TRAIN) + len(LATER)
    assert report.rows_out == len(items) + len(users)
    disliked = sum(not liked for _, _, liked, _ in TRAIN)
    assert report.dropped == {"not in train": len(LATER), "not liked": disliked}
    assert report.notes["item_pairs"] == len(items)
    assert report.notes["user_anchors"] == len(set(users["anchor_id"].to_pylist()))
    top = [row["neighbor_id"] for row in items.to_pylist() if row["rank"] == 1]
    hub = max(set(top), key=lambda item: (top.count(item), item))
    assert report.notes["item_hubness"] == {"distinct_top1": len(set(top)), "max_top1": top.count(hub), "hub": hub}
    # Half of the later rows gone, the others changed and moved in front: the same value in every column.
    later = [(11 - u, i, liked, s) for u, i, liked, s in reversed(LATER[::2])]
    _, items_too, users_too = swing(tmp_path, "again", [*later, *reversed(TRAIN)], top_k=5)
    assert items_too.equals(items)
    assert users_too.equals(users)


@pytest.mark.spark
def test_swing_without_a_pair_is_an_error(spark, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="swing found no item pair"):
        swing(tmp_path, "lonely", [(u, u, True, "train") for u in range(5)])


DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="en">
<page><title>Casino (1995 film)</title><ns>0</ns><id>3</id><revision><text>{{Infobox film
| name = Casino
}}
'''Casino''' is a film by [[Martin Scorsese]].
[[Category:1995 films]]</text></revision></page>
<page><title>Casino</title><ns>0</ns><id>1</id><revision><text>A '''casino''' is a house.</text></revision></page>
<page><title>Casino film</title><ns>0</ns><id>2</id><redirect title="Casino (1995 film)" /><revision><text>#REDIRECT
[[Casino (1995 film)]]</text></revision></page>
<page><title>Talk:Casino</title><ns>1</ns><id>4</id><revision><text>Talk</text></revision></page>
</mediawiki>
"""


@pytest.mark.spark
def test_wiki_then_link(spark, tmp_path: Path) -> None:
    dump = tmp_path / "wiki.xml.bz2"
    dump.write_bytes(bz2.compress(DUMP.encode()))
    settings = Settings.model_validate({"wiki": {"dump": dump}})
    assert wiki_files(settings) == {"dump": dump}
    wiki = context(tmp_path, "wiki", settings, wiki_files(settings))
    report = run_wiki(wiki)
    pages = schemas.read_table(wiki.out / "pages.parquet", schemas.PAGES)
    assert pages["wiki_page_id"].to_pylist() == [1, 2, 3]
    assert (report.rows_in, report.rows_out, report.dropped) == (4, 3, {"other namespaces": 1})
    assert report.notes["redirects"] == 1
    assert report.notes["evidence"] == {"film": 1}

    ingest = tmp_path / "ingest"
    items = pa.table(
        {
            "item_id": pa.array([20, 10], pa.int64()),
            "title": ["Casino", "Casino Royale"],
            "year": pa.array([1995, None], pa.int32()),
            "genres": [["Drama"], []],
            "imdb_url": ["", ""],
        }
    )
    schemas.write_table(items, ingest / "items.parquet", schemas.ITEMS)
    link = context(tmp_path, "link", settings, ingest=ingest, wiki=wiki.out)
    report = run_link(link)
    links = schemas.read_table(link.out / "links.parquet", schemas.LINKS).to_pylist()
    assert [row["item_id"] for row in links] == [10, 20]
    assert links[1]["wiki_page_id"] == 3
    assert report.notes["coverage"] == 0.5
    assert report.notes["methods"] == {"exact": 1}
    assert report.notes["reasons"] == {"no candidate": 1}


@pytest.mark.spark
def test_a_dump_without_articles_is_an_error(spark, tmp_path: Path) -> None:
    dump = tmp_path / "wiki.xml"
    dump.write_text(DUMP[: DUMP.index("<page>")] + DUMP[DUMP.index("<page><title>Talk") :], encoding="utf-8")
    settings = Settings.model_validate({"wiki": {"dump": dump}})
    with pytest.raises(DataError, match="holds 1 pages and none of them is an article"):
        run_wiki(context(tmp_path, "wiki", settings, wiki_files(settings)))


def test_importing_the_package_loads_no_spark() -> None:
    code = (
        "import sys, kellm_spark, kellm_spark.stages; "
        "print(*(m for m in ('pyspark', 'numba', 'lxml', 'torch') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


@pytest.mark.parametrize("home", ["/nowhere", None])
def test_no_java_is_told_in_one_line(home: str | None) -> None:
    """In a process of its own: here a session may be running."""
    code = (
        "from kellm_features.errors import KellmError\n"
        "from kellm_features.settings import SparkSettings\n"
        "from kellm_spark.session import get_session\n"
        "try:\n    get_session(SparkSettings())\n"
        "except KellmError as error:\n    print(error)\n"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("JAVA_HOME", "PATH")}
    env |= {"PATH": "/nonexistent", **({"JAVA_HOME": home} if home else {})}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.startswith("Spark needs Java: ")
    assert "install Java 17" in done.stdout
    assert done.stdout.count("\n") == 1
