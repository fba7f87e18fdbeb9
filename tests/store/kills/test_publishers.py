"""Publishers that are not alone, and publishing again."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Callable
from typing import Any

import pytest

from kellm_features.errors import StoreError
from kellm_features.store import publish, rollout
from kellm_features.store.backends import update
from kellm_features.store.backends.redis import LEASE_S
from kellm_features.store.catalog import Catalog
from kellm_features.store.layout import ITEM_EMBEDDING, USER_EMBEDDING
from kellm_features.store.reader import EmbeddingReader

from .shop import ITEMS, KINDS, Shop, entry

pytestmark = pytest.mark.feast


@pytest.mark.parametrize("kind", KINDS)
def test_of_two_publishers_one_wins_and_the_other_says_who(open_shop: Callable[..., Shop], kind: str) -> None:
    shop = open_shop(kind)
    first = shop.start("publish", "v2", at=entry(publish._write_rows), then="pause")
    first.wait_paused()
    told = shop.run("publish", "v3")["error"]
    assert re.search(rf"another publish into .*repo is running \(process {first.pid} since .* UTC\): wait", told)
    assert "is running" in shop.run("prune")["error"]
    shop.assert_serves("v1")
    assert shop.state("v2") == "unfinished"
    rollout.promote(shop.repo, "v1")  # what is served can be changed meanwhile
    first.resume()
    assert first.result() == {"done": "v2"}
    shop.publish("v3")
    for version in ("v2", "v3"):
        shop.assert_serves(version, pinned=True)
    shop.assert_tidy()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_two_repositories_of_one_redis_take_turns(open_shop: Callable[..., Shop], kind: str) -> None:
    shop = open_shop(kind)
    shutil.copytree(shop.repo, shop.folder / "second")
    second = {"repo": str(shop.folder / "second")}
    first = shop.start("publish", "v2", at=entry(publish._write_rows), then="pause")
    first.wait_paused()
    told = shop.run("publish", "v3", **second)["error"]
    host = re.escape(socket.gethostname())
    assert re.search(rf"into Redis 127.0.0.1:\d+ is running \({host} process {first.pid} since [\d:]+ UTC\)", told)
    with shop.redis() as client:
        assert client.persist("kellm:{kellm}:lease") == 1  # time alone never ends it now
    first.kill()  # a dead publisher's claim on this machine ends with it
    assert shop.run("publish", "v3", **second) == {"done": "v3"}
    shop.publish("v2")
    for version in ("v2", "v3"):
        shop.assert_serves(version, pinned=True)
    shop.assert_tidy()


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("stands", [publish._plan, publish._write_rows], ids=["planning", "writing"])
def test_a_publisher_that_slept_through_its_claim_publishes_nothing(
    open_shop: Callable[..., Shop], kind: str, stands: Callable[..., Any]
) -> None:
    """A laptop lid, a paused container: another took over, under the same name with other rows."""
    shop = open_shop(kind)
    shutil.copytree(shop.repo, shop.folder / "second")
    sleeper = shop.start("publish", "v2", at=entry(stands), then="pause")
    sleeper.wait_paused()
    with shop.redis() as client:
        assert client.delete("kellm:{kellm}:lease") == 1  # as its time does
    other = shop.start(
        "publish", "v2", seed=1, repo=str(shop.folder / "second"), at=entry(Catalog.finish), then="pause"
    )
    other.wait_paused()
    sleeper.resume()
    assert re.search(r"version v2 .*another publish", sleeper.result()["error"])
    assert shop.state("v2") == "unfinished"
    other.resume()
    assert other.result() == {"done": "v2"}
    shop.assert_serves("v2", seed=1, pinned=True)
    shop.assert_serves("v1")


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_claim_in_the_name_of_this_very_process_is_taken_over(open_shop: Callable[..., Shop], kind: str) -> None:
    """Process ids repeat: in a container that is restarted the next publisher has the dead one's."""
    shop = open_shop(kind)
    left = f"{socket.gethostname()} process {os.getpid()} since 00:00:00 UTC 0123456789abcdef"
    with shop.redis() as client:
        client.set("kellm:{kellm}:lease", left, px=LEASE_S * 1000)
    with shop.backend() as backend, shop.backend() as rival:
        with backend.lease(), pytest.raises(StoreError, match=f"process {os.getpid()}"), rival.lease():
            pass
        with rival.lease():
            pass


@pytest.mark.parametrize("kind", KINDS)
def test_promotions_and_rollbacks_of_four_processes_are_all_counted(open_shop: Callable[..., Shop], kind: str) -> None:
    shop = open_shop(kind)
    names = ["v1", "v2", "v3", "v4"]
    for name in names[1:]:
        shop.publish(name)
    start = shop.catalog()
    jobs = [shop.start("race", names=names, times=25, luck=luck) for luck in range(4)]
    made = sorted(change for job in jobs for change in job.result()["done"])
    end = shop.catalog()
    # Every change was made on top of the one before it: no two of one revision, none missing.
    assert [revision for revision, _, _ in made] == list(range(start.revision + 1, end.revision + 1))
    assert len(made) > 25
    served = [entry.version for entry in start.history]
    for _, name, active in made:
        if name is None:
            served.pop()
        else:
            served = [other for other in served if other != name] + [name]
        assert active == served[-1]
    assert [entry.version for entry in end.history] == served
    assert end.active == served[-1]
    assert set(end.retired) == {"v1", *(active for _, _, active in made)} - {end.active}
    times = [entry.since for entry in end.history]
    assert times == sorted(times)
    shop.assert_serves(served[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_publishing_a_version_again_repairs_it_and_never_changes_it(open_shop: Callable[..., Shop], kind: str) -> None:
    shop = open_shop(kind)
    partition = shop.repo / "data" / ITEM_EMBEDDING.name / "v1.parquet"
    written = (partition.read_bytes(), partition.stat().st_mtime_ns)
    namespace = f"{ITEM_EMBEDDING.name}_v{shop.catalog().get('v1').views[ITEM_EMBEDDING.name].number}"
    shop.lose_rows(namespace)
    with EmbeddingReader.from_repo(shop.repo) as reader:
        assert 0 < reader.get(range(1, ITEMS + 1)).found.sum() < ITEMS
    before = shop.catalog()
    told = shop.run("publish", "v1", seed=1)["error"]
    assert "was published on" in told
    assert f"with other rows of {ITEM_EMBEDDING.name}, {USER_EMBEDDING.name}, and a version never changes" in told
    with EmbeddingReader.from_repo(shop.repo) as reader:
        assert 0 < reader.get(range(1, ITEMS + 1)).found.sum() < ITEMS
    shop.publish("v1")
    shop.assert_serves("v1")
    assert shop.catalog() == before
    assert (partition.read_bytes(), partition.stat().st_mtime_ns) == written


def test_the_same_change_by_two_at_the_same_moment_is_two_changes(open_shop: Callable[..., Shop]) -> None:
    """The second finds the catalog as it wanted it, and must not take the first one's change for its own."""
    shop = open_shop("sqlite")
    start = shop.catalog().revision

    def change(catalog: Catalog) -> Catalog:
        return catalog.verified("v1", {"found": "the same"})

    with shop.backend() as backend, shop.backend() as other:
        swap, first = backend.swap, iter([True])

        def beaten(before: Catalog, after: Catalog) -> bool:
            if next(first, False):
                update(other, change)
            return swap(before, after)

        backend.swap = beaten
        update(backend, change)
    assert shop.catalog().revision == start + 2
