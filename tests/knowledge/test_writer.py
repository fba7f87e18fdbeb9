"""What becomes of answers that are no use, of requests that fail, of budgets that end, and of a side left alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

import pyarrow.parquet as pq
import pytest

from kellm_features.artifacts import Artifact, Manifest
from kellm_features.errors import EngineError
from kellm_features.knowledge import generate
from kellm_features.knowledge.engines import Answer, Completion, Prompt
from kellm_features.knowledge.generate import TABLES, why_unfinished
from kellm_features.schemas import DEAD_LETTERS, read_table
from kellm_features.settings import load_settings
from kellm_features.stages import StageContext, StageReport

from .world import SECTIONS

AGAIN = "Name only persons, titles, years and numbers that stand in the text above."
ALL = "generate.limit=6"
USERS = ("generate.side=user", "generate.user_engine=fake")


def rows(ctx: StageContext, side: str = "item") -> dict[Any, dict[str, Any]]:
    name, schema = TABLES[side]
    return {row[f"{side}_id"]: row for row in read_table(ctx.out / name, schema).to_pylist()}


def letters(ctx: StageContext) -> list[dict[str, Any]]:
    return read_table(ctx.out / "dead_letters.parquet", DEAD_LETTERS).to_pylist()


def titles(asked: Sequence[Prompt]) -> list[str]:
    return sorted(prompt.facts.title for prompt in asked)


def left(report: StageReport) -> str | None:
    manifest = Manifest.model_construct(stage="generate", notes=report.notes)
    return why_unfinished(load_settings(), Artifact(generate.Path(), manifest))


class TestGrounding:
    def test_an_unfounded_answer_is_asked_for_again(self, world, fake) -> None:
        fake.answers = {AGAIN: "Heat (1995) is a crime film by Michael Mann."}  # the second prompt's alone
        fake.answers["Heat"] = "Heat (1982) was shot in Norway by Lars Berg and Ole Dahl."
        ctx = world.context("generate")
        report = generate.run(ctx)
        row = rows(ctx)[2]
        assert (row["description_source"], row["grounding"]) == ("llm", 1.0)
        assert row["description"] == "Heat (1995) is a crime film by Michael Mann."
        assert (row["prompt_tokens"], row["completion_tokens"]) == (100, 20)
        assert report.notes["asked_again"] == 1
        assert report.notes["ungrounded_answers"] == 1
        first, second = (prompt.user for prompt in fake.asked if prompt.facts.title == "Heat")
        assert second == f"{first}\n{AGAIN}"

    def test_two_unfounded_answers_give_way_to_the_page(self, world, fake) -> None:
        fake.answers = {"Heat": "Heat (1982) was shot in Norway by Lars Berg and Ole Dahl."}
        ctx = world.context("generate")
        generate.run(ctx)
        row = rows(ctx)[2]
        assert row["description"] == f"Heat (1995): {world.leads[2]}"
        assert (row["description_source"], row["grounding"], row["prompt_tokens"]) == ("extract", 1.0, 100)
        fake.asked = []
        generate.run(world.context("generate"))
        assert fake.asked == []

    def test_the_threshold_is_a_setting(self, world, fake) -> None:
        fake.answers = {"Heat": "Heat (1982) was shot in Norway by Lars Berg and Ole Dahl."}
        ctx = world.context("generate", "generate.min_grounding=0")
        generate.run(ctx)
        row = rows(ctx)[2]
        assert row["description_source"] == "llm"
        assert 0 < row["grounding"] < 0.5

    def test_nothing_is_scored_without_a_source(self, world, fake) -> None:
        fake.answers = {"Fargo": "Fargo was shot by Lars Berg in 1703, and nobody can tell."}
        ctx = world.context("generate")
        generate.run(ctx)
        assert rows(ctx)[3]["description_source"] == "llm"  # closed-book: there is no page to hold it against
        assert rows(ctx)[3]["grounding"] is None

    def test_profiles_are_held_against_the_history(self, world, fake) -> None:
        fake.answers = {
            "aged 24": "This viewer adores Casablanca (1942), Ozu and Kurosawa.",
            "aged 25-34": "This viewer enjoys comedies for the family.",
        }
        ctx = world.context("generate", *USERS)
        generate.run(ctx)
        users = rows(ctx, "user")
        assert users[1]["description_source"] == "template"  # two unfounded answers
        assert users[1]["grounding"] == 1.0
        # A taste can be told without names: there is nothing to hold against anything.
        assert (users[2]["description_source"], users[2]["grounding"]) == ("llm", None)


class TestFailures:
    def test_the_rest_goes_on_and_the_next_run_asks_again(self, world, fake) -> None:
        fake.refused = {"Heat": "the server answered 500 six times", "Fargo": "the prompt is too long"}
        ctx = world.context("generate", ALL)
        report = generate.run(ctx)
        items = rows(ctx)
        assert [items[i]["description_source"] for i in range(1, 7)] == [
            "llm",
            "extract",
            "template",
            "llm",
            "llm",
            "llm",
        ]
        assert [(row["side"], row["id"], row["model_id"]) for row in letters(ctx)] == [
            ("item", "2", "fake-1"),
            ("item", "3", "fake-1"),
        ]
        assert letters(ctx)[0]["reason"] == "the server answered 500 six times"
        assert report.notes["dead_letters"] == 2
        assert left(report) == "2 failed requests are left"
        fake.refused, fake.asked = {}, []
        again = world.context("generate", ALL)
        report = generate.run(again)
        assert titles(fake.asked) == ["Fargo", "Heat"]
        assert letters(again) == []
        assert left(report) is None
        assert {row["description_source"] for row in rows(again).values()} == {"llm"}

    def test_a_failed_second_answer_is_a_dead_letter_too(self, world, fake) -> None:
        fake.answers = {"Heat": "Heat (1982) was shot in Norway by Lars Berg and Ole Dahl."}
        fake.refused = {AGAIN: "the server went away"}
        ctx = world.context("generate")
        generate.run(ctx)
        assert [row["id"] for row in letters(ctx)] == ["2"]
        assert rows(ctx)[2]["description_source"] == "extract"
        assert rows(ctx)[2]["prompt_tokens"] == 50

    def test_many_in_a_row_end_the_run(self, world, fake) -> None:
        fake.refused = {"": "connection refused"}
        with pytest.raises(EngineError, match=r"3 requests in a row failed .* connection refused"):
            generate.run(world.context("generate", ALL, "generate.max_failures=3"))
        assert len(fake.asked) == 3

    def test_prompts_that_are_refused_for_themselves_do_not(self, world, fake) -> None:
        fake.refused, fake.transient = {"The title is: ": "the prompt is too long"}, False
        ctx = world.context("generate", ALL, "generate.max_failures=1")
        report = generate.run(ctx)
        assert report.notes["dead_letters"] == 3
        assert len(fake.asked) == 6

    def test_an_engine_that_breaks_the_rules_is_named(self, world, fake, monkeypatch) -> None:
        def twice(requests: Sequence[Prompt], *, max_tokens: int) -> Iterator[tuple[int, Answer]]:
            yield from [(0, Completion("Heat (1995) is a film, and it is a long one."))] * 2

        def never(requests: Sequence[Prompt], *, max_tokens: int) -> Iterator[tuple[int, Answer]]:
            yield from ()

        monkeypatch.setattr(fake, "generate", twice)
        with pytest.raises(EngineError, match="fake-1 answered request 0 of 2 twice"):
            generate.run(world.context("generate"))
        monkeypatch.setattr(fake, "generate", never)
        with pytest.raises(EngineError, match="left 2 of 2 requests unanswered"):
            generate.run(world.context("generate"))


class TestBudget:
    def test_runs_go_on_where_the_budget_ended(self, world, fake) -> None:
        fake.cost = (150, 90)
        spent, described = 0, []
        for _ in range(20):
            ctx = world.context("generate", ALL, "generate.budget_tokens=700")
            report = generate.run(ctx)
            tokens = report.notes["prompt_tokens"] + report.notes["completion_tokens"]
            assert 0 < tokens <= 700
            spent += tokens
            described.append(sum(row["description_source"] == "llm" for row in rows(ctx).values()))
            assert report.notes["waiting"] == 6 - described[-1]
            if left(report) is None:
                break
        assert len(described) >= 3
        assert described == sorted(set(described))
        assert described[-1] == 6
        assert spent == 6 * 240  # nothing was paid for twice
        assert len(fake.asked) == 6

    def test_the_first_in_rank_are_served(self, world, fake) -> None:
        fake.cost = (300, 90)
        ctx = world.context("generate", ALL, "generate.budget_tokens=600")
        report = generate.run(ctx)
        assert titles(fake.asked) == ["Toy Story"]  # most train rows
        assert left(report) == "5 waiting requests are left"

    @pytest.mark.parametrize("silent", ["no usage", "failure"])
    def test_what_tells_no_usage_is_booked_at_its_most(self, world, fake, silent: str) -> None:
        fake.cost = (0, 0)
        fake.refused = {"": "500"} if silent == "failure" else {}
        report = generate.run(world.context("generate", ALL, "generate.budget_tokens=1100"))
        assert 0 < len(fake.asked) < 6
        assert report.notes["waiting"] == 6 - len(fake.asked)

    def test_nothing_is_asked_without_a_budget(self, world, fake) -> None:
        report = generate.run(world.context("generate", ALL, "generate.budget_tokens=0"))
        assert fake.asked == []
        assert report.notes["waiting"] == 6


class TestSides:
    def test_the_other_side_stays(self, world, fake) -> None:
        both = world.context("generate", "generate.user_engine=fake")
        generate.run(both)
        world.titles = {1: "Toy Story Two"}
        world.write()
        fake.asked = []
        items = world.context("generate", "generate.side=item", "generate.user_engine=fake", previous=both.out.name)
        generate.run(items)
        assert titles(fake.asked) == ["Toy Story Two"]
        assert pq.read_table(items.out / TABLES["user"][0]).equals(pq.read_table(both.out / TABLES["user"][0]))
        assert rows(items)[1]["description"].startswith("Toy Story Two")
        fake.asked = []
        users = world.context("generate", *USERS, previous=items.out.name)
        generate.run(users)
        assert pq.read_table(users.out / TABLES["item"][0]).equals(pq.read_table(items.out / TABLES["item"][0]))
        assert len(fake.asked) == 3  # every user whose history has that film in it; the fourth has none

    def test_profiles_of_another_cut_are_not_taken_over(self, world, fake) -> None:
        """A longer history holds what is a label under a shorter one."""
        first = world.context("generate", *USERS)
        generate.run(first)
        ctx = world.context("generate", "generate.side=item", "history.max_events=1", previous=first.out.name)
        generate.run(ctx)
        assert {row["description_source"] for row in rows(ctx, "user").values()} == {"template"}
        assert "Heat" not in rows(ctx, "user")[1]["description"]  # this user's second event

    def test_failures_and_waiting_texts_of_the_other_side_stay(self, world, fake) -> None:
        fake.refused = {"Heat": "500"}
        items = world.context("generate", "generate.side=item")
        generate.run(items)
        users = world.context("generate", *USERS)
        users = dataclasses.replace(users, previous=world.artifact(items.out.name, {"waiting_by_side": {"item": 4}}))
        users.previous.manifest.models["fake-1"] = "a"
        fake.refused = {}
        report = generate.run(users)
        assert [(row["side"], row["id"], row["reason"]) for row in letters(users)] == [("item", "2", "500")]
        assert report.notes["waiting"] == 4
        assert report.models["fake-1"] == "a"

    def test_forgetting_one_side_keeps_the_other(self, world, fake) -> None:
        first = world.context("generate", "generate.user_engine=fake")
        generate.run(first)
        generate.run(world.context("generate", "generate.side=item", "generate.resume=false", previous=first.out.name))
        fake.asked = []
        generate.run(world.context("generate", *USERS, previous=first.out.name))
        assert fake.asked == []

    def test_without_earlier_texts_the_other_side_is_of_templates(self, world, fake) -> None:
        ctx = world.context("generate", *USERS)
        generate.run(ctx)
        assert {row["description_source"] for row in rows(ctx).values()} == {"template"}
        assert {key for key, row in rows(ctx, "user").items() if row["description_source"] == "llm"} == {1, 2, 3}

    def test_texts_of_another_split_are_not_taken_over(self, world, fake) -> None:
        first = world.context("generate", "generate.user_engine=fake")
        generate.run(first)
        ctx = world.context("generate", "generate.side=item", previous=first.out.name)
        ctx.previous.manifest.__dict__["split_hash"] = "another"
        generate.run(ctx)
        assert {row["description_source"] for row in rows(ctx, "user").values()} == {"template"}


class TestUsers:
    def test_only_a_changed_history_asks_for_a_new_profile(self, world, fake) -> None:
        first = world.context("generate", *USERS)
        generate.run(first)
        assert len(fake.asked) == 3
        fake.asked = []
        world.leads[1] = world.leads[1].replace("cowboy", "astronaut")  # a digest in all three prompts
        world.write()
        second = world.context("generate", *USERS)
        generate.run(second)
        assert fake.asked == []
        assert pq.read_table(second.out / TABLES["user"][0]).equals(pq.read_table(first.out / TABLES["user"][0]))
        world.events = [(1, 6, 5, 0, "train"), *world.events[1:]]  # the first user's first event
        world.write()
        generate.run(world.context("generate", *USERS))
        (prompt,) = fake.asked
        assert "aged 24" in prompt.user
        fake.asked = []
        generate.run(world.context("generate", *USERS, "generate.user_refresh=prompt"))
        assert len(fake.asked) == 3 - 1  # the first user's prompt is the one just asked; those of the others changed

    def test_a_kept_profile_keeps_its_score(self, world, fake) -> None:
        fake.answers = {"<history>": "Their taste runs to a cowboy doll, Tom Hanks and Tim Allen."}
        world.leads[1] = "Toy Story is a 1995 film. It stars Tom Hanks and Tim Allen. A cowboy doll is jealous."
        world.write()
        first = world.context("generate", *USERS)
        generate.run(first)
        before = {key: row for key, row in rows(first, "user").items() if row["description_source"] == "llm"}
        assert before
        fake.asked = []
        world.leads[1] = "Toy Story is a film about toys."  # nothing of it is left in the digests
        world.write()
        second = world.context("generate", *USERS)
        generate.run(second)
        assert fake.asked == []
        assert {key: rows(second, "user")[key] for key in before} == before

    def test_a_changed_second_prompt_is_asked(self, world, fake, tmp_path) -> None:
        shipped = resources.files("kellm_features.knowledge") / "domains" / "movies.toml"
        own = tmp_path / "own.toml"
        own.write_text(shipped.read_text().replace("[user]", "[user]\nagain = 'Be true.'"))
        fake.answers = {"<history>": "Their taste runs to Casablanca (1942), Ozu and Kurosawa."}
        for domain, asked in ((str(own), 6), (str(own), 0)):
            fake.asked = []
            generate.run(world.context("generate", *USERS, f"generate.domain={domain}"))
            assert len(fake.asked) == asked
        own.write_text(own.read_text().replace("Be true.", "Be truthful."))
        fake.asked = []
        generate.run(world.context("generate", *USERS, f"generate.domain={own}"))
        assert len(fake.asked) == 3

    def test_the_longest_histories_first_and_none_too_short(self, world, fake) -> None:
        generate.run(world.context("generate", *USERS, "generate.user_limit=1"))
        assert ["aged 24" in prompt.user for prompt in fake.asked] == [True]
        fake.asked = []
        report = generate.run(world.context("generate", *USERS, "generate.min_history=3"))
        assert report.notes["users_by_source"] == {"llm": 2, "template": 2}

    def test_profiles_have_a_token_limit_of_their_own(self, world, fake, monkeypatch) -> None:
        limits = []
        asked = fake.generate
        monkeypatch.setattr(
            fake, "generate", lambda r, *, max_tokens: limits.append(max_tokens) or asked(r, max_tokens=max_tokens)
        )
        generate.run(world.context("generate", "generate.user_engine=fake", "generate.user_max_tokens=200"))
        assert set(limits) == {96, 200}


class TestFactors:
    def test_one_text_per_factor(self, world, fake) -> None:
        told = {"genre": "crime", "director": "Michael Mann", "actors": "unknown", "time period": "1995"}
        fake.answers = {"Heat": json.dumps(told), "Toy Story": "It is a film."}
        ctx = world.context("generate", "generate.factors=true")
        generate.run(ctx)
        items = rows(ctx)
        assert dict(items[2]["factors"]) == {"genre": "crime", "director": "Michael Mann", "time period": "1995"}
        assert items[2]["description"] == "Heat (1995). Genre: crime. Director: Michael Mann. Time period: 1995."
        assert items[2]["grounding"] == 1.0
        # Twice no factor at all: the page itself.
        assert (items[1]["description_source"], items[1]["factors"]) == ("extract", None)
        # Templates tell the factors that they know.
        assert dict(items[4]["factors"]) == {"genre": "science fiction horror", "director": "Ridley Scott"}
        prompt = fake.asked[0]
        assert list(prompt.schema["properties"])[:2] == ["genre", "director"]
        assert "Answer with one JSON object" in prompt.system

    def test_the_name_that_the_writer_adds_earns_nothing(self, world, fake) -> None:
        fake.answers = {"Heat": json.dumps({"director": "Quentin Tarantino"})}
        ctx = world.context("generate", "generate.factors=true")
        generate.run(ctx)
        assert rows(ctx)[2]["description_source"] == "extract"

    def test_none_are_asked_for_by_default(self, world, fake) -> None:
        ctx = world.context("generate")
        generate.run(ctx)
        assert {row["factors"] for row in rows(ctx).values()} == {None}
        assert all(prompt.schema is None for prompt in fake.asked)


def test_a_page_without_a_lead_still_tells(world, fake, monkeypatch) -> None:
    monkeypatch.setitem(SECTIONS, 2, [("Plot", "A detective hunts a crew of thieves.")])
    world.leads[2] = ""
    world.write()
    fake.answers = {"Heat": ""}
    ctx = world.context("generate")
    generate.run(ctx)
    assert rows(ctx)[2]["description_source"] == "extract"
    assert rows(ctx)[2]["description"] == "Heat (1995): A detective hunts a crew of thieves."


def test_nothing_to_ask_starts_no_engine(world, fake, monkeypatch) -> None:
    generate.run(world.context("generate", ALL))
    started = []
    monkeypatch.setattr(type(fake), "shard_size", property(lambda self: started.append(1) or 2), raising=False)
    del fake.__dict__["shard_size"]
    generate.run(world.context("generate", ALL))
    assert started == []


def test_the_text_is_no_less_fresh_for_being_kept(world, fake) -> None:
    """`resume` off: everything is asked for once more, and what was kept is forgotten."""
    generate.run(world.context("generate", ALL))
    fake.asked = []
    report = generate.run(world.context("generate", ALL, "generate.resume=false"))
    assert (len(fake.asked), report.notes["cache_hits"]) == (6, 0)
    fake.asked = []
    generate.run(world.context("generate", ALL))
    assert fake.asked == []
