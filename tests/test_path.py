"""The whole path through the command line: a part of MovieLens-100K, the sample wiki, Spark, the encoder, Feast."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from kellm_features import schemas
from kellm_features.artifacts import load_artifact
from kellm_features.data.movielens import read_100k
from kellm_features.stages import STAGE_NAMES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.spark,
    pytest.mark.feast,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Feast's client, on its own dependencies
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CONFIG = """
[data]
format = "table"
interactions = "events.parquet"
items = "items.parquet"
users = "users.csv"

[spark]
master = "local[2]"
driver_memory = "1g"

[swing]
top_k = 20

[generate]
engine = "template"

[train]
epochs = 2
batch_size = 256

[store]
repo = "feature_repo"
"""
TABLES = {
    "ingest/interactions.parquet": schemas.INTERACTIONS,
    "ingest/items.parquet": schemas.ITEMS,
    "ingest/users.parquet": schemas.USERS,
    "swing/item_pairs.parquet": schemas.PAIRS,
    "swing/user_pairs.parquet": schemas.PAIRS,
    "wiki/pages.parquet": schemas.PAGES,
    "link/links.parquet": schemas.LINKS,
    "generate/item_descriptions.parquet": schemas.ITEM_DESCRIPTIONS,
    "generate/user_descriptions.parquet": schemas.USER_DESCRIPTIONS,
    "encode/item_encodings.parquet": schemas.ITEM_ENCODINGS,
    "encode/user_encodings.parquet": schemas.USER_ENCODINGS,
    "export/item_embeddings.parquet": schemas.ITEM_EMBEDDINGS,
    "export/user_embeddings.parquet": schemas.USER_EMBEDDINGS,
}


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from kellm_features.cli import main; main()", *words]
    environment = {**os.environ, "COLUMNS": "160", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def kellm(folder: Path, *words: str) -> str:
    process = start(folder, *words)
    told, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own project: 160 users and 300 items as plain tables, with a kellm.toml; killed once on its way."""
    folder = tmp_path_factory.mktemp("project")
    raw = read_100k(None)
    items = raw.items[raw.items["item_id"] <= 300]
    events = raw.interactions[(raw.interactions["user_id"] <= 160) & (raw.interactions["item_id"] <= 300)]
    events.to_parquet(folder / "events.parquet")
    items.to_parquet(folder / "items.parquet")
    assert raw.users is not None
    raw.users[raw.users["user_id"] <= 160].to_csv(folder / "users.csv", index=False)
    (folder / "kellm.toml").write_text(CONFIG)
    _kill_during_swing(folder)
    kellm(folder, "run", "--out", "run")
    return folder


def _kill_during_swing(folder: Path) -> None:
    process = start(folder, "run", "--out", "run")
    deadline = time.monotonic() + 120
    while not (folder / "run" / ".swing.new").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert load_artifact(folder / "run", "ingest") is not None
    assert load_artifact(folder / "run", "swing") is None


def test_every_artefact_has_its_columns_and_manifest(folder: Path) -> None:
    run = folder / "run"
    manifests = {}
    for name in STAGE_NAMES:
        artifact = load_artifact(run, name)
        assert artifact is not None
        manifests[name] = artifact.manifest
    for name, schema in TABLES.items():
        schema.check(pq.read_table(run / name).schema, name)
    splits = {name: manifest.split_hash for name, manifest in manifests.items() if name != "wiki"}
    assert len(set(splits.values())) == 1
    assert all(splits.values())
    assert manifests["wiki"].split_hash is None
    assert all(manifest.seconds > 0 and manifest.peak_mib > 0 for manifest in manifests.values())


def test_every_item_and_user_is_served(folder: Path) -> None:
    for side in ("item", "user"):
        wanted = pq.read_table(folder / f"run/ingest/{side}s.parquet").column(f"{side}_id").to_pylist()
        served = pq.read_table(folder / f"run/export/{side}_embeddings.parquet").column(f"{side}_id").to_pylist()
        assert served == wanted
        told = kellm(folder, "fetch", "--json", "--view", f"{side}_knowledge_embedding", *map(str, wanted))
        assert [json.loads(line)["found"] for line in told.splitlines()] == [True] * len(wanted)


def test_well_known_links(folder: Path) -> None:
    """Read off the sample Wikipedia by hand, remakes and same-title pages included."""
    links = pq.read_table(folder / "run/link/links.parquet").to_pandas().set_index("item_id")
    expected = {
        1: "Toy Story",
        50: "Star Wars (film)",
        100: "Fargo (1996 film)",
        185: "Psycho (1960 film)",
        7: "12 Monkeys",
    }
    assert links.loc[list(expected), "wiki_title"].to_dict() == expected
    unlinked = links[links["wiki_title"].isna()]
    assert len(unlinked) > 0
    assert unlinked["reason"].notna().all()


def test_stock_feast_returns_what_fetch_prints(folder: Path) -> None:
    from feast import FeatureStore

    rows = [{"item_id": key} for key in (50, 172, 181, 999_999)]
    store = FeatureStore(str(folder / "feature_repo"))
    stock = store.get_online_features(["item_knowledge_embedding:embedding"], rows).to_dict()
    ours = [json.loads(line) for line in kellm(folder, "fetch", "--json", "50", "172", "181", "999999").splitlines()]
    assert [line["found"] for line in ours] == [True, True, True, False]
    for line, vector in zip(ours[:3], stock["embedding"], strict=False):
        assert np.float32(line["embedding"]).tobytes() == np.float32(vector).tobytes()
    assert stock["embedding"][3] is None
    exported = pq.read_table(folder / "run/export/item_embeddings.parquet").to_pandas().set_index("item_id")
    assert np.array_equal(np.float32(stock["embedding"][0]), exported.loc[50, "embedding"])
    assert ours[0]["version"] == exported.loc[50, "embedding_version"]


def test_the_fetch_snippets_of_the_readme_run(folder: Path) -> None:
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    reader, stock = (block.split("```")[0] for block in readme.split("```python\n")[1:3])
    code = f"{reader}\n{stock}\nprint(items.values.shape, items.values.tolist() == rows['embedding'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(3, 64) True"


def test_repeating_skips_everything(folder: Path) -> None:
    told = kellm(folder, "run", "--out", "run")
    assert told.count("skipped: unchanged") == len(STAGE_NAMES)
    assert (folder / "run" / "report.html").exists()


def test_later_rows_leave_pairs_alone(folder: Path) -> None:
    """Flip every label of validation and test, and delete a third of these rows: no pair may move."""
    events = pd.read_parquet(folder / "events.parquet")
    parts = pq.read_table(folder / "run/ingest/interactions.parquet").to_pandas()
    marked = events.merge(parts[["user_id", "item_id", "split"]], on=["user_id", "item_id"])
    later = marked["split"] != "train"
    marked.loc[later, "rating"] = 6 - marked.loc[later, "rating"]
    marked = marked[~later | (np.arange(len(marked)) % 3 != 0)]
    assert len(marked) < len(events)
    assert marked["user_id"].nunique() == events["user_id"].nunique()  # the split is drawn over the same users
    marked.drop(columns="split").to_parquet(folder / "flipped.parquet")
    kellm(folder, "run", "--out", "other", "--until", "swing", "--set", 'data.interactions="flipped.parquet"')
    for name in ("item_pairs", "user_pairs"):
        ours, others = (pq.read_table(folder / run / f"swing/{name}.parquet") for run in ("run", "other"))
        assert ours.equals(others)
