"""A run made by hand: 12 items, two genres, vectors in known directions, and text that tries to break out."""

import json
import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from kellm_features import schemas
from kellm_features.artifacts import Manifest, digest, hash_outputs, write_manifest
from kellm_features.settings import VerifySettings
from kellm_features.store.verification import Gate, Verification

HOSTILE = "<script>alert('x')</script>"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
LABELS = {1: "One", 2: f"Two {HOSTILE}", 3: "Three"}
RAW_DEGREES = [0, 10, 25, 45, 70, 100, 135, 175, 220, 270, 300, 330]
"""Raw encoding of item n is the unit vector at RAW_DEGREES[n - 1]."""
ADAPTED_DEGREES = [0, 90, 25, 110, 70, 4, 135, 175, 220, 270, 2, 330]


def table(rows: Sequence[tuple[object, ...]], schema: pa.Schema) -> pa.Table:
    return pa.table([list(column) for column in zip(*rows, strict=True)], schema=schema)


def unit(degrees: float) -> list[float]:
    return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]


def finish(run: Path, stage: str, **figures: object) -> None:
    outputs = hash_outputs(run / stage)
    fields: dict[str, object] = {
        "rows_in": 20, "rows_out": 12, "dropped": {}, "seconds": 1.25, "cpu_seconds": 2.5, "peak_mib": 100.0,
    }  # fmt: skip
    manifest = Manifest.model_validate(
        {
            "stage": stage, "run_id": f"run-{stage}", "version": "0.1.0", "created": NOW, "config": {},
            "config_hash": "c", "inputs": {}, "files": {}, "split_hash": "s", "outputs": outputs,
            "output_hash": digest(outputs), **fields, **figures,
        }
    )  # fmt: skip
    write_manifest(run / stage, manifest)


def make_ingest(run: Path) -> None:
    items = [(n, LABELS.get(n, f"Item {n}"), 1990 + n, ["Drama" if n % 2 else "Comedy", "War"]) for n in range(1, 13)]
    schemas.write_table(table(items, schemas.ITEMS.arrow()), run / "ingest/items.parquet", schemas.ITEMS)
    events = []
    for user in range(1, 7):  # item 1: 6 train rows, 2: 5, 3 and 4: 4, 5: 3; item 12 only in test
        liked_items = [item for item, count in ((1, 6), (2, 5), (3, 4), (4, 4), (5, 3)) if user <= count]
        events += [(user, item, 4.0, True, NOW, "train") for item in liked_items]
        events += [(user, 12, 5.0, True, NOW, "test")]
    schemas.write_table(
        table(events, schemas.INTERACTIONS.arrow()), run / "ingest/interactions.parquet", schemas.INTERACTIONS
    )
    users = [(user, None, None, None) for user in range(1, 7)]
    schemas.write_table(table(users, schemas.USERS.arrow()), run / "ingest/users.parquet", schemas.USERS)
    finish(run, "ingest", rows_in=12345, dropped={"item not in the catalogue": 42, "nothing": 0})


def make_swing(run: Path) -> None:
    item_pairs = [
        (1, 11, 0.9, 5, 1), (1, 6, 0.8, 4, 2), (2, 11, 0.7, 3, 1), (3, 11, 0.6, 2, 1), (4, 2, 0.5, 2, 1),
        (1, 2, 0.1, 1, 21),
    ]  # fmt: skip
    user_pairs = [(1, 2, 0.5, 2, 1), (2, 1, 0.5, 2, 1)]
    for name, rows in (("item", item_pairs), ("user", user_pairs)):
        path = run / f"swing/{name}_pairs.parquet"
        schemas.write_table(table(rows, schemas.PAIRS.arrow()), path, schemas.PAIRS)
    finish(run, "swing")


def make_wiki(run: Path) -> None:
    lead = f"One is a film {HOSTILE} about counting. " + "word " * 300
    pages = [(7, f"One {HOSTILE}", None, None, False, lead, [], [], [], 1991), *(
        (page, f"Page {page}", None, None, False, f"Lead {page}.", [], [], [], None) for page in (8, 9)
    ), (10, f"Rival {HOSTILE}", None, "Page 8", False, "", [], [], [], None), (
        11, f"Rival {HOSTILE}", None, None, False, f"The rival's lead {HOSTILE}.", [], [], [], 1992
    )]  # fmt: skip
    schemas.write_table(table(pages, schemas.PAGES.arrow()), run / "wiki/pages.parquet", schemas.PAGES)
    finish(run, "wiki")


LINKS = [
    (1, 7, f"One {HOSTILE}", 0.75, "exact", f"Rival {HOSTILE}", None),
    (2, 8, "Page 8", 1.0, "exact", None, None),
    (3, 9, "Page 9", 0.91, "fuzzy", None, None),
    (4, None, None, 0.5, None, None, f"tie {HOSTILE}"),
    *((n, None, None, 0.0, None, None, "no page of that name") for n in range(5, 13)),
]


def make_link(run: Path, rows: list[tuple[object, ...]] = LINKS) -> None:
    schemas.write_table(table(rows, schemas.LINKS.arrow()), run / "link/links.parquet", schemas.LINKS)
    finish(run, "link")


DESCRIPTIONS: list[dict[str, object]] = [
    {
        "item_id": n,
        "description": f"Text {n} {HOSTILE}",
        "description_source": "llm" if n in (1, 2, 4) else "template",
        "grounding": 0.5 if n < 4 else None,
    }
    for n in range(1, 13)
]


def make_generate(
    run: Path,
    rows: Sequence[dict[str, object]] = DESCRIPTIONS,
    dead_letters: Sequence[dict[str, object]] = (),
    **figures: object,
) -> None:
    model = {"prompt_hash": "h", "model_id": "SmolLM2-135M-Instruct"}
    tokens = {"llm": {"prompt_tokens": 40, "completion_tokens": 9}}
    none = {"prompt_tokens": 0, "completion_tokens": 0}
    for name, schema, of_table in (
        ("item_descriptions", schemas.ITEM_DESCRIPTIONS, rows),
        ("dead_letters", schemas.DEAD_LETTERS, dead_letters),
    ):
        filled = [model | tokens.get(str(row.get("description_source")), none) | row for row in of_table]
        path = run / f"generate/{name}.parquet"
        schemas.write_table(pa.Table.from_pylist(filled, schema=schema.arrow()), path, schema)
    finish(run, "generate", **figures)


def make_encode(run: Path) -> None:
    rows = [(n, unit(degrees), "h", "encoder") for n, degrees in enumerate(RAW_DEGREES, 1)]
    path = run / "encode/item_encodings.parquet"
    schemas.write_table(table(rows, schemas.ITEM_ENCODINGS.arrow(dim=2)), path, schemas.ITEM_ENCODINGS)
    finish(run, "encode")


def make_train(run: Path) -> None:
    (run / "train").mkdir()
    steps = [{"step": n, "epoch": 1, "loss": 1.0, "ctr": 0.7 - n / 100, "uu": 9.0 - n, "ii": 8.0 - n} for n in range(4)]
    epochs = [{"epoch": n, "valid_auc": auc, "loss": 1.0} for n, auc in ((1, 0.61), (2, 0.6489), (3, 0.64))]
    curves = {"steps": steps, "epochs": epochs, "best_epoch": 2}
    (run / "train/curves.json").write_text(json.dumps(curves))
    parts = {
        "valid": {"auc": 0.6489, "log_loss": 0.61, "gauc": 0.6},
        "test": {"auc": 0.6377, "log_loss": 0.6213, "gauc": 0.5921},
    }
    (run / "train/metrics.json").write_text(json.dumps(parts))
    finish(run, "train")


def make_export(run: Path) -> None:
    rows = [
        (n, [2 * x for x in unit(degrees)], "v-123", "m", "h", NOW, NOW) for n, degrees in enumerate(ADAPTED_DEGREES, 1)
    ]
    path = run / "export/item_embeddings.parquet"
    schemas.write_table(table(rows, schemas.ITEM_EMBEDDINGS.arrow()), path, schemas.ITEM_EMBEDDINGS)
    finish(run, "export")


def make_publish(run: Path) -> None:
    (run / "publish").mkdir()
    gate = {"name": "coverage", "view": "item_knowledge_embedding", "passed": True, "measured": 0.975, "minimum": 0.95}
    gates = Verification(
        version="v-123",
        against="v-122",
        checked_at=NOW,
        seed=0,
        settings=VerifySettings(),
        gates=(Gate(**gate, detail="39 of 40 ids"),),
    )
    notes = {
        "repo": "/data/feature repo",
        "version": "v-123",
        "promoted": True,
        "rows": {"item_knowledge_embedding": 12},
        "gates": gates.model_dump(mode="json"),
    }
    finish(run, "publish", notes=notes, seconds=1000.5)


MAKERS = {
    "ingest": make_ingest, "swing": make_swing, "wiki": make_wiki, "link": make_link, "generate": make_generate,
    "encode": make_encode, "train": make_train, "export": make_export, "publish": make_publish,
}  # fmt: skip


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Make a run directory with the named stages, all by default, these links, and what `make_generate` takes."""

    def make(
        *stages: str, links: list[tuple[object, ...]] | None = None, generate: dict[str, object] | None = None
    ) -> Path:
        run = tmp_path / "runs" / "small"
        run.mkdir(parents=True)
        for stage in stages or tuple(MAKERS):
            if stage == "link" and links is not None:
                make_link(run, links)
            elif stage == "generate" and generate is not None:
                make_generate(run, **generate)
            else:
                MAKERS[stage](run)
        return run

    return make
