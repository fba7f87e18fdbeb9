from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kellm_features.errors import DataError, EngineError, SchemaError
from kellm_features.knowledge import generate
from kellm_features.knowledge.engines import load_engine
from kellm_features.schemas import ITEM_DESCRIPTIONS, USER_DESCRIPTIONS, read_table
from kellm_features.settings import GenerateSettings, load_settings
from kellm_features.stages import StageContext


def rows(ctx: StageContext, side: str) -> dict[Any, dict[str, Any]]:
    schema = ITEM_DESCRIPTIONS if side == "item" else USER_DESCRIPTIONS
    table = read_table(ctx.out / f"{side}_descriptions.parquet", schema)
    return {row[f"{side}_id"]: row for row in table.to_pylist()}


def test_every_item_and_user_is_described(world, fake) -> None:
    ctx = world.context("generate")
    report = generate.run(ctx)
    items, users = rows(ctx, "item"), rows(ctx, "user")
    assert list(items) == [1, 2, 3, 4, 5, 6]
    assert list(users) == [1, 2, 3, 4]
    # Train rows per item: 1, 2 and 3 have two each, 4, 5 and 6 one; the test user's rows count for nothing.
    assert {i: row["description_source"] for i, row in items.items()} == {
        1: "llm", 2: "llm", 3: "llm", 4: "template", 5: "template", 6: "template",
    }  # fmt: skip
    assert items[1]["model_id"] == "fake-1"
    assert items[4]["description"] == (
        "Alien (1979) is a science fiction horror film (sci-fi) directed by Ridley Scott. "
        "A crew meets a hostile creature."
    )
    assert items[5]["description"] == "Nobody Saw This is a film."
    assert users[4]["description"] == "A male viewer (writer, aged 50) without a known history."
    # User 1 has six events: the first three are history.
    assert users[1]["description"] == (
        "A male viewer (technician, aged 24) who likes action, animation and children's films of the 1990s. "
        "Liked Toy Story and Heat. Disliked Alien."
    )
    assert report.models == {"fake-1": "a", "template": "1"}
    assert report.rows_out == 10
    notes = report.notes
    assert notes["items_by_source"] == {"llm": 3, "template": 3}
    assert (notes["items_grounded"], notes["items_without_page"]) == (3, 3)
    assert (notes["generated"], notes["prompt_tokens"], notes["completion_tokens"]) == (3, 150, 30)
    assert (notes["dead_letters"], notes["waiting"]) == (0, 0)
    json.dumps(notes)
    spent = {i: (row["prompt_tokens"], row["completion_tokens"]) for i, row in items.items()}
    assert spent == {1: (50, 10), 2: (50, 10), 3: (50, 10), 4: (0, 0), 5: (0, 0), 6: (0, 0)}
    # Scored where there is a page to hold them against: everything that a template says was read off it.
    assert {i for i, row in items.items() if row["grounding"] is not None} == {1, 2, 4}
    assert items[4]["grounding"] == 1.0


def test_grounded_where_linked_and_closed_book_otherwise(world, fake) -> None:
    generate.run(world.context("generate"))
    prompts = {prompt.facts.title: prompt.user for prompt in fake.asked}
    assert "<page>" in prompts["Toy Story"]
    assert prompts["Fargo"].startswith("Introduce the film Fargo (1996)")


@pytest.mark.parametrize("score", [0.5, 1.5])
def test_an_item_is_grounded_on_all_its_pages_the_best_first(world, fake, score: float) -> None:
    world.more_links = [(1, 4, score)]  # the page of Alien, surer or less sure than its own
    world.write()
    report = generate.run(world.context("generate"))
    (prompt,) = (prompt.user for prompt in fake.asked if prompt.facts.title == "Toy Story")
    leads = [prompt.index(f"{name}: {name} is a") for name in ("Toy Story", "Alien")]
    assert leads == sorted(leads, reverse=score > 1)
    assert report.notes["items_grounded"] == 3


def test_an_unfit_answer_falls_back_and_says_so(world, fake) -> None:
    fake.answers = {"Heat": "", "Fargo": "no no no no no no no no no no"}
    ctx = world.context("generate")
    report = generate.run(ctx)
    items = rows(ctx, "item")
    assert (items[2]["description_source"], items[2]["model_id"]) == ("extract", "extract")
    assert items[2]["description"] == "Heat (1995): " + world.leads[2]
    assert (items[3]["description_source"], items[3]["model_id"]) == ("template", "template")
    assert items[3]["description"] == "Fargo (1996) is a crime and drama film."
    # Of the film with a page a second answer was asked for, as empty as the first.
    assert (report.notes["unfit_answers"], report.notes["asked_again"]) == (3, 1)
    assert items[2]["prompt_tokens"] == 100
    assert items[3]["prompt_tokens"] == 50
    before = items[2]["prompt_hash"]
    world.leads[2] = world.leads[2].replace("thieves", "robbers")
    world.write()
    again = world.context("generate")
    generate.run(again)
    assert rows(again, "item")[2]["prompt_hash"] != before


def test_a_killed_run_resumes_with_what_is_missing(world, fake) -> None:
    overrides = ("generate.limit=6",)
    fake.fail_after = 3  # one shard of two is done, and half of the next, when it breaks
    with pytest.raises(EngineError, match="switched off"):
        generate.run(world.context("generate", *overrides))
    done = [prompt.user for prompt in fake.asked]
    assert len(done) == 3
    fake.fail_after, fake.asked = None, []
    resumed = world.context("generate", *overrides)
    report = generate.run(resumed)
    assert len(fake.asked) == 3
    assert not {prompt.user for prompt in fake.asked} & set(done)
    assert (report.notes["generated"], report.notes["cache_hits"]) == (3, 3)
    fake.asked = []
    whole = world.context("generate", *overrides)
    generate.run(whole)
    assert fake.asked == []
    for side in ("item", "user"):
        assert pq.read_table(whole.out / f"{side}_descriptions.parquet").equals(
            pq.read_table(resumed.out / f"{side}_descriptions.parquet")
        )


def test_only_changed_prompts_are_generated_again(world, fake) -> None:
    first = world.context("generate", "generate.limit=6")
    generate.run(first)
    fake.asked = []
    world.titles = {3: "Fargo Revisited"}
    world.write()
    second = world.context("generate", "generate.limit=6")
    generate.run(second)
    assert [prompt.facts.title for prompt in fake.asked] == ["Fargo Revisited"]
    before, after = rows(first, "item"), rows(second, "item")
    assert {i for i in before if before[i] != after[i]} == {3}
    # A setting that does not shape these prompts changes nothing; one that does changes all.
    fake.asked = []
    generate.run(world.context("generate", "generate.limit=5", "generate.profile_tokens=500"))
    assert fake.asked == []
    generate.run(world.context("generate", "generate.limit=6", "generate.max_tokens=64"))
    assert len(fake.asked) == 6
    fake.asked, fake.revision = [], "b"
    generate.run(world.context("generate", "generate.limit=6"))
    assert len(fake.asked) == 6


@pytest.mark.parametrize("user_engine", ["template", "fake"])
def test_no_profile_sees_an_event_behind_the_cut(world, fake, user_engine: str) -> None:
    """Targets of every user get other items and ratings, or vanish: the user table stays as it was."""
    # Item descriptions come from templates here: which items the model describes may follow train rows.
    overrides = ("generate.limit=0", f"generate.user_engine={user_engine}", "history.max_events=2")
    first = world.context("generate", *overrides)
    generate.run(first)
    table = pq.read_table(first.out / "user_descriptions.parquet")
    original = list(world.events)
    seen: dict[int, int] = {}
    changed, kept = [], []
    for user, item, rating, minute, split in original:
        seen[user] = seen.get(user, 0) + 1
        is_target = seen[user] > 2  # every user here has 3 events or more, so the first two are history
        changed.append((user, 7 - item if is_target else item, 6 - rating if is_target else rating, minute, split))
        if not is_target or seen[user] == 3:  # one target stays: the cut is half of all events
            kept.append((user, item, rating, minute, split))
    assert len(kept) < len(changed)
    for events in (changed, kept):
        assert events != original
        world.events = events
        world.write()
        again = world.context("generate", *overrides)
        generate.run(again)
        assert pq.read_table(again.out / "user_descriptions.parquet").equals(table)
    # The check has teeth: a change within the history is seen.
    world.events = [(1, 6, 5, 0, "train"), *original[1:]]
    world.write()
    seen_change = world.context("generate", *overrides)
    generate.run(seen_change)
    assert not pq.read_table(seen_change.out / "user_descriptions.parquet").equals(table)


def test_string_ids_stay_strings(world, fake) -> None:
    world.id_of, world.id_type = (lambda number: f"id-{number}"), pa.string()
    world.write()
    ctx = world.context("generate")
    generate.run(ctx)
    assert list(rows(ctx, "item")) == [f"id-{n}" for n in range(1, 7)]


def test_a_link_to_a_page_that_is_not_there(world, fake) -> None:
    for part in (world.root / "wiki" / "pages.parquet").glob("part-*"):
        table = pq.read_table(part)
        pq.write_table(table.filter(pa.compute.not_equal(table["wiki_page_id"], 102)), part)
    with pytest.raises(DataError, match="page 102, to which item 2 is linked, is not there"):
        generate.run(world.context("generate"))


def test_pages_without_a_column_are_refused(world, fake) -> None:
    for part in (world.root / "wiki" / "pages.parquet").glob("part-*"):
        pq.write_table(pq.read_table(part).drop_columns(["lead"]), part)
    with pytest.raises(SchemaError, match="column 'lead' is missing"):
        generate.run(world.context("generate"))


def test_unknown_engine_and_model_are_named() -> None:
    with pytest.raises(EngineError, match=r"no engine 'gpt'; installed are: .*template.*transformers"):
        load_engine("gpt", GenerateSettings())
    with pytest.raises(EngineError, match=r"'generate.model' is '/no/such'.*: accepted are SmolLM2"):
        load_engine("transformers", GenerateSettings(model="/no/such"))


def test_input_files_are_those_that_the_settings_name_by_path(tmp_path: Path) -> None:
    assert generate.input_files(load_settings()) == {}
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "README.md").write_text("no weights")
    own = load_settings(None, [f"generate.model={model}", f"generate.domain={tmp_path}/own.toml"])
    assert generate.input_files(own) == {
        "domain": tmp_path / "own.toml",
        "model/config.json": model / "config.json",
    }


def test_prompt_hash_is_a_sha256(world, fake) -> None:
    ctx = world.context("generate")
    generate.run(ctx)
    hashes = [row["prompt_hash"] for row in rows(ctx, "item").values()]
    assert len(set(hashes)) == 6
    assert all(len(h) == hashlib.sha256().digest_size * 2 for h in hashes)
