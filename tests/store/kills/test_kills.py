"""Publishers that are killed, starved or not alone: what is served stays whole, and the next publish completes.

Publishers run as processes of their own, forked from one that has everything imported (worker.py):
a kill is a SIGKILL, a full disk is RLIMIT_FSIZE, Redis is a redis-server. Every kill is at a line of the store's
code, taken from a list that a first publish made, or at a random time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kellm_features.errors import StoreError
from kellm_features.store import publish, rollout
from kellm_features.store.catalog import Catalog
from kellm_features.store.layout import ITEM_DESCRIPTION, ITEM_EMBEDDING
from kellm_features.store.reader import EmbeddingReader

from .shop import ITEMS, KINDS, SEED, Job, Shop, entry, line

pytestmark = pytest.mark.feast


def places_of(shop: Shop, call: str, version: str = "", **job: Any) -> list[list[Any]]:
    """Every line of the store's code at which such a run calls anything, with the number of times that it does."""
    told = shop.run(call, version, watch=True, **job)
    return [[place, times] for place, times in told["places"].items()]


def sample(places: list[list[Any]], count: int, rng: random.Random) -> list[list[Any]]:
    """Lines spread over the run, each with the one of its times at which to act."""
    step = len(places) / count
    chosen = [places[int((i + rng.random()) * step)] for i in range(count)]
    return [[place, rng.randint(1, times)] for place, times in chosen]


@pytest.mark.parametrize("kind", KINDS)
def test_a_publisher_killed_anywhere_leaves_the_active_version_and_is_completed(
    open_shop: Callable[..., Shop], kind: str
) -> None:
    shop, rng = open_shop(kind), random.Random(SEED)
    shop.release("v2")
    before = time.monotonic()
    shop.publish("v2")
    took_s = time.monotonic() - before
    places = places_of(shop, "publish", "v3")
    rollout.promote(shop.repo, "v3", force=True)
    exact, anytime = {"sqlite": (14, 6), "stock": (10, 4), "packed": (4, 2)}[kind]
    kills = [{"at": place, "then": "kill"} for place in sample(places, exact, rng)] + [{}] * anytime
    served, states, killed = "v3", set(), 0
    for number, kill in enumerate(kills, start=4):
        version = f"v{number}"
        shop.release(version)
        job = shop.start("publish", version, **kill)
        if not kill:
            time.sleep(rng.random() * took_s)
            job.kill()
        killed += not job.result()
        state = shop.state(version)
        states.add(state)
        shop.assert_serves(served)
        if state == "published":
            shop.assert_serves(version, pinned=True)
        else:
            with pytest.raises(StoreError, match=r"not published to its end|holds no version"):
                EmbeddingReader.from_repo(shop.repo, version=version)
            with pytest.raises(StoreError, match=r"not published to its end|holds no version"):
                rollout.promote(shop.repo, version, force=True)
        shop.publish(version, promote=True)
        shop.assert_serves(version)
        shop.assert_serves(served, pinned=True)
        shop.assert_tidy()
        served = version
        if number % 5 == 0:
            rollout.prune(shop.repo, 1, grace_s=0)
            shop.assert_serves(served)
    assert killed >= exact - 1  # a line that the first publish came by may be spared a later one
    assert {"absent", "unfinished"} <= states
    assert len({(view.number, name) for v in shop.catalog().versions for name, view in v.views.items()}) == len(
        shop.namespaces()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_prune_goes_on_and_spares_what_is_shared(open_shop: Callable[..., Shop], kind: str) -> None:
    shop, rng = open_shop(kind), random.Random(SEED)
    shop.publish("v2", promote=True)
    descriptions = {version.views[ITEM_DESCRIPTION.name].number for version in shop.catalog().versions}
    assert len(descriptions) == 1  # equal rows are held once
    places = places_of(shop, "prune")  # and v1 is gone
    for number, kill in enumerate(sample(places, 5, rng), start=3):
        version = f"v{number}"
        shop.publish(version, promote=True)
        assert shop.run("prune", at=kill, then="kill") == {}
        shop.assert_serves(version)
        doomed = shop.state(f"v{number - 1}")
        assert doomed in ("published", "pruning", "absent")
        if doomed == "pruning":
            with pytest.raises(StoreError, match="it is being pruned"):
                rollout.promote(shop.repo, f"v{number - 1}", force=True)
        rollout.prune(shop.repo, 1, grace_s=0)
        assert [line.name for line in rollout.status(shop.repo).versions] == [version]
        shop.assert_serves(version)
        shop.assert_tidy()
    assert {version.views[ITEM_DESCRIPTION.name].number for version in shop.catalog().versions} == descriptions
    assert shop.rows_of(f"{ITEM_DESCRIPTION.name}_v{descriptions.pop()}") == ITEMS


def test_prune_spares_the_active_version_and_what_was_active_lately(open_shop: Callable[..., Shop]) -> None:
    shop = open_shop("sqlite")
    shop.publish("v2", promote=True)
    assert rollout.prune(shop.repo, 1, grace_s=600) == []  # requests may still be reading v1
    rollout.rollback(shop.repo)
    shop.publish("v3")
    assert rollout.prune(shop.repo, 1, grace_s=0) == ["v2"]
    shop.assert_serves("v1")
    shop.assert_serves("v3", pinned=True)
    shop.assert_tidy()


@pytest.mark.parametrize("kind", KINDS)
def test_pruning_an_unfinished_version_leaves_nothing_of_it(open_shop: Callable[..., Shop], kind: str) -> None:
    shop = open_shop(kind)
    before = shop.partitions()
    # The partition lies aside, complete and not yet renamed; its rows are not written.
    assert shop.run("publish", "v2", at=line("partitions.py", "os.fsync("), then="kill") == {}
    assert any(path.name.endswith(".new") for path in shop.repo.rglob("*"))
    assert rollout.prune(shop.repo, 1) == ["v2"]
    shop.assert_tidy()
    assert shop.partitions() == before
    assert shop.run("publish", "v2", at=entry(Catalog.finish), then="kill") == {}
    assert shop.state("v2") == "unfinished"
    assert rollout.prune(shop.repo, 1) == ["v2"]
    shop.assert_tidy()
    assert shop.partitions() == before
    shop.assert_serves("v1")


def test_partitions_of_a_pruned_version_outlive_an_unfinished_second_publish_of_it(
    open_shop: Callable[..., Shop],
) -> None:
    """They are history to train on, and v2 shares one of them."""
    shop = open_shop("sqlite")
    shop.publish("v2", promote=True)
    assert rollout.prune(shop.repo, 1, grace_s=0) == ["v1"]
    before = shop.partitions()
    assert {f"{view}/v1.parquet" for view in (ITEM_EMBEDDING.name, ITEM_DESCRIPTION.name)} <= before
    for _ in range(2):  # the second attempt takes the first one over
        assert shop.run("publish", "v1", at=entry(publish._write_rows), then="kill") == {}
    assert rollout.prune(shop.repo, 1, grace_s=0) == ["v1"]
    assert shop.partitions() == before
    shop.publish("v1")
    shop.assert_serves("v1", pinned=True)
    shop.assert_serves("v2")


def test_a_publisher_killed_while_feast_applies_is_completed(tmp_path: Path, spawn: Callable[..., Job]) -> None:
    """The first publish of all; what Feast's own process still does then is waited for or does no harm."""
    shop = Shop(tmp_path / "repo", tmp_path / "releases", spawn)
    job = shop.start("publish", "v1")
    deadline = time.monotonic() + 60
    while not (shop.repo / "data" / "registry.db").exists():  # in the middle of it
        assert time.monotonic() < deadline
        time.sleep(0.002)
    job.kill()
    assert rollout.status(shop.repo).versions == ()
    shop.publish("v1", promote=True)
    shop.assert_serves("v1")
