"""Feast's own client on our stores: one version per response, published rows guarded, a team's own views untouched."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sqlite3
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
import pytest

from kellm_features.errors import StoreError
from kellm_features.store import rollout
from kellm_features.store.backends import open_backend
from kellm_features.store.reader import EmbeddingReader
from kellm_features.store.repo import read_online_config

from .marks import FEAST, KINDS

pytestmark = [*FEAST, pytest.mark.redis]
REDIS_KINDS = ("redis", "packed")
ITEM = "item_knowledge_embedding"
USER = "user_knowledge_embedding"


@pytest.fixture(scope="module", params=KINDS)
def shop(request: pytest.FixtureRequest, make_shop) -> Any:
    """v1 served, v2 published; tests that promote say first what they need."""
    return make_shop(request.param)


@pytest.fixture(scope="module", params=REDIS_KINDS)
def redis_shop(request: pytest.FixtureRequest, make_shop) -> Any:
    return make_shop(request.param)


def ask(store: Any, refs: list[str] | str, **ids: list) -> dict[str, list]:
    """Feature -> values, and `NAME?` -> statuses."""
    features = store.get_feature_service(refs) if isinstance(refs, str) else refs
    response = store.get_online_features(features, ids, full_feature_names=True)
    return told(response)


def told(response: Any) -> dict[str, list]:
    from feast.protos.feast.serving.ServingService_pb2 import FieldStatus

    values = response.to_dict()
    for name, vector in zip(response.proto.metadata.feature_names.val, response.proto.results, strict=True):
        values[f"{name}?"] = [FieldStatus.Name(status) for status in vector.statuses]
    return values


def everything(view: str) -> list[str]:
    return [f"{view}:{name}" for name in ("embedding", "embedding_version", "model_id", "content_hash", "embedded_at")]


def test_all_features_of_the_served_version(shop) -> None:
    shop.promote("v1")
    got = ask(shop.store(), everything(ITEM), item_id=[50, 1, 50, 51])
    embeddings = got[f"{ITEM}__embedding"]
    np.testing.assert_array_equal(np.array(embeddings[:3], np.float32), shop.vectors("v1", [50, 1, 50]))
    assert embeddings[3] is None
    assert got[f"{ITEM}__embedding_version"] == ["v1", "v1", "v1", None]
    assert got[f"{ITEM}__model_id"] == ["adapter", "adapter", "adapter", None]
    assert got[f"{ITEM}__content_hash"] == ["v1-50", "v1-1", "v1-50", None]
    moment = int(datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp())
    assert got[f"{ITEM}__embedded_at"] == [moment, moment, moment, None]
    for name in ("embedding", "model_id", "embedded_at"):
        assert got[f"{ITEM}__{name}?"] == ["PRESENT", "PRESENT", "PRESENT", "NOT_FOUND"]


def test_the_other_views(shop) -> None:
    """Text with accents, null links (which are there, and null), lists, and an empty list."""
    shop.promote("v1")
    refs = ["item_description:description", "item_wiki_link:wiki_page_id", "item_wiki_link:reason"]
    refs += ["item_swing_neighbors:neighbor_ids", "item_swing_neighbors:scores"]
    got = ask(shop.store(), refs, item_id=[4, 3, 99])
    assert got["item_description__description"] == [
        "About 4, told for v1: “naïve”.",
        "About 3, told for v1: “naïve”.",
        None,
    ]
    assert got["item_wiki_link__wiki_page_id"] == [1004, None, None]
    assert got["item_wiki_link__wiki_page_id?"] == ["PRESENT", "PRESENT", "NOT_FOUND"]
    assert got["item_wiki_link__reason"] == [None, "no candidate", None]
    pairs = shop.runs["v1"].tables["swing", "item_pairs.parquet"].to_pandas().sort_values("rank")
    for place, key in enumerate([4, 3]):
        mine = pairs[pairs.anchor_id == key]
        assert got["item_swing_neighbors__neighbor_ids"][place] == mine.neighbor_id.tolist()
        assert got["item_swing_neighbors__scores"][place] == mine.score.tolist()
    assert got["item_swing_neighbors__scores"][2] is None


def test_two_views_are_of_one_version(shop) -> None:
    """A promote while a request is answered, between its two views, changes the next request and not this one."""
    shop.promote("v1")
    store = shop.store()
    kept = store._get_provider().online_store
    read = kept.online_read

    def slow(*args: Any, **kwargs: Any) -> Any:
        shop.promote("v2")
        return read(*args, **kwargs)

    refs = [f"{ITEM}:embedding_version", "item_description:description", f"{USER}:embedding_version"]
    fields = kept._read_hash_fields if hasattr(kept, "_read_hash_fields") else None
    kept.online_read = slow
    if fields is not None:
        kept._read_hash_fields = lambda *args: (shop.promote("v2"), fields(*args))[1]
    during = ask(store, refs, item_id=[7], user_id=[7])
    del kept.online_read
    if fields is not None:
        del kept._read_hash_fields
    after = ask(store, refs, item_id=[7], user_id=[7])
    for got, version in ((during, "v1"), (after, "v2")):
        assert got[f"{ITEM}__embedding_version"] == got[f"{USER}__embedding_version"] == [version]
        assert f"told for {version}" in got["item_description__description"][0]


def test_string_ids(make_shop) -> None:
    for kind in KINDS:
        shop = make_shop(kind, key=lambda i: f"tt{i:04d}*é")
        got = ask(shop.store(), everything(ITEM), item_id=["tt0050*é", "tt0051*é", ""])
        np.testing.assert_array_equal(
            np.array(got[f"{ITEM}__embedding"][:1], np.float32), shop.vectors("v1", ["tt0050*é"])
        )
        assert got[f"{ITEM}__embedding?"] == ["PRESENT", "NOT_FOUND", "NOT_FOUND"]
        refs = ["item_swing_neighbors:neighbor_ids"]
        neighbors = ask(shop.store(), refs, item_id=["tt0003*é"])["item_swing_neighbors__neighbor_ids"][0]
        assert sorted(neighbors) == ["tt0001*é", "tt0002*é"]


def rows(store: Any, version: str, when: datetime) -> pd.DataFrame:
    """One row of the embedding view as `feast materialize` or a push would write it."""
    columns = {
        "item_id": [1],
        "embedding": [np.ones(8, np.float32)],
        "embedding_version": [version],
        "model_id": ["another"],
        "content_hash": ["c"],
        "embedded_at": [1],
        "event_timestamp": [when],
        "created_timestamp": [when],
    }
    return pd.DataFrame(columns)


@pytest.mark.parametrize("way", ["sync", "async"])
def test_published_rows_are_not_written_in_place(shop, way: str) -> None:
    """Rows of another time are refused; those of the active version are there, and stay as they are."""
    if way == "async" and shop.kind == "sqlite":
        pytest.skip("Feast's SQLite store has no asynchronous writes")
    shop.promote("v1")
    store = shop.store()
    event = datetime(2026, 3, 1, 12, 0, 0, 250_000, tzinfo=UTC)

    def write(frame: pd.DataFrame) -> None:
        if way == "sync":
            store.write_to_online_store(ITEM, frame)
        else:
            asyncio.run(store.write_to_online_store_async(ITEM, frame))

    for when in (event + timedelta(days=1), event - timedelta(days=1)):
        with pytest.raises(StoreError, match=r"is served in version v1, whose rows .* run  kellm publish  and"):
            write(rows(store, "mine", when))
    write(rows(store, "mine", event))
    got = ask(shop.store(), everything(ITEM), item_id=[1])
    assert got[f"{ITEM}__embedding_version"] == ["v1"]
    np.testing.assert_array_equal(np.array(got[f"{ITEM}__embedding"], np.float32), shop.vectors("v1", [1]))


def test_feast_materialize_of_the_served_version_changes_nothing(shop) -> None:
    """And of a version that is published and not served it is refused."""
    shop.promote("v1")
    store = shop.store()
    store.apply([store.get_feature_view("item_description")])
    folder = shop.repo / "data" / "item_description"
    view = store.get_feature_view("item_description")
    view.batch_source.file_options.uri = str(folder)  # the copy's own partitions
    store.apply([view])
    start = datetime(2026, 2, 1, tzinfo=UTC)
    store.materialize(start, datetime(2026, 3, 2, tzinfo=UTC), feature_views=["item_description"])
    with pytest.raises(Exception, match="is served in version v1"):  # Feast's engine wraps what a store raises
        store.materialize(start, datetime(2026, 3, 20, tzinfo=UTC), feature_views=["item_description"])
    got = ask(shop.store(), ["item_description:description"], item_id=[50, 51])
    assert got["item_description__description"] == ["About 50, told for v1: “naïve”.", None]


def test_nothing_is_promoted_yet(make_repo, make_run, tmp_path, redis_db) -> None:
    """A view that kellm has published is guarded before the first promote too, and its rows are not served."""
    for kind, online in (("sqlite", None), ("redis", redis_db())):
        repo = make_repo(tmp_path / kind, online)
        rollout.publish(repo, rollout.run_inputs(make_run(tmp_path / f"run-{kind}").folder))
        from feast import FeatureStore

        store = FeatureStore(str(repo))
        assert ask(store, everything(ITEM), item_id=[1])[f"{ITEM}__embedding?"] == ["NOT_FOUND"]
        with pytest.raises(StoreError, match=r"serves no version yet, .* run  kellm promote"):
            store.write_to_online_store(ITEM, rows(store, "mine", datetime(2026, 3, 1, tzinfo=UTC)))


def clicks(count: int, when: datetime) -> pd.DataFrame:
    return pd.DataFrame({"item_id": [1], "clicks": [count], "rate": [count / 7], "event_timestamp": [when]})


def test_views_of_the_teams_own_are_as_in_stock_feast(shop) -> None:
    """Written in place, the later one wins, pushed to; their ttl is ignored online as stock Feast ignores it."""
    shop.promote("v1")
    store = shop.store()
    old = datetime.now(UTC) - timedelta(days=3)  # past the view's ttl of one hour
    store.write_to_online_store("item_clicks", clicks(1, old))
    refs = ["item_clicks:clicks", "item_clicks:rate"]
    assert ask(store, refs, item_id=[1])["item_clicks__clicks"] == [1]
    store.push("clicks_push", clicks(2, old + timedelta(hours=1)))
    got = ask(store, refs, item_id=[1, 2])
    assert got["item_clicks__clicks"] == [2, None]
    assert got["item_clicks__rate"] == [2 / 7, None]
    assert got["item_clicks__clicks?"] == ["PRESENT", "NOT_FOUND"]
    # beside views of ours in one request, before and after a switch
    for version in ("v2", "v1"):
        shop.promote(version)
        got = ask(store, "mixed", item_id=[2, 1])
        assert got["item_clicks__clicks"] == [None, 2]
        assert got[f"{ITEM}__embedding_version"][0] == version
        assert f"told for {version}" in got["item_description__description"][0]


def test_a_service_tagged_with_a_version(shop) -> None:
    shop.promote("v1")
    store = shop.store()
    got = ask(store, "ranker_on_v1", item_id=[1])
    np.testing.assert_array_equal(np.array(got[f"{ITEM}__embedding"], np.float32), shop.vectors("v1", [1]))
    shop.promote("v2")
    with pytest.raises(StoreError, match=r"'ranker_on_v1' needs embedding version 'v1' and the store serves 'v2'"):
        ask(store, "ranker_on_v1", item_id=[2])
    shop.promote("v1")
    ask(store, "ranker_on_v1", item_id=[1])


def test_a_service_of_precomputed_copies_is_refused(shop) -> None:
    shop.promote("v1")
    with pytest.raises(StoreError, match=f"precompute_online=True, and copies of {ITEM} would be served on"):
        ask(shop.store(), "precomputed", item_id=[1])


def test_async_clients(redis_shop) -> None:
    """Two loops one after the other, ten requests at once in each, the switch between them."""
    shop = redis_shop

    async def fetch(version: str) -> None:
        store = shop.store()  # Feast's asynchronous client belongs to the loop that it was first asked in
        refs = [*everything(ITEM), "item_description:description", f"{USER}:embedding_version"]

        async def one() -> dict[str, list]:
            ids = {"item_id": [7, 99], "user_id": [3, 3]}
            return told(await store.get_online_features_async(refs, ids, full_feature_names=True))

        for got in await asyncio.gather(*(one() for _ in range(10))):
            np.testing.assert_array_equal(
                np.array(got[f"{ITEM}__embedding"][:1], np.float32), shop.vectors(version, [7])
            )
            assert got[f"{ITEM}__content_hash"] == [f"{version}-7", None]
            assert got[f"{ITEM}__content_hash?"] == ["PRESENT", "NOT_FOUND"]
            assert f"told for {version}" in got["item_description__description"][0]
            assert got[f"{USER}__embedding_version"] == [version, version]
        service = store.get_feature_service("ranker_on_v1")
        shop.promote("v2")
        with pytest.raises(StoreError, match="needs embedding version 'v1'"):
            await store.get_online_features_async(service, {"item_id": [7]})
        await store.close()

    shop.promote("v1")
    asyncio.run(fetch("v1"))
    asyncio.run(fetch("v2"))


def test_one_client_in_many_threads(shop) -> None:
    """A server answers its requests in threads: eight of them, while the version is switched to and fro."""
    shop.promote("v1")
    store = shop.store()
    ids = list(range(2, 42))
    wanted = {version: shop.vectors(version, ids).tolist() for version in ("v1", "v2")}

    def request(_rng: random.Random) -> str:
        got = ask(store, everything(ITEM), item_id=ids)
        (version,) = set(got[f"{ITEM}__embedding_version"])
        assert got[f"{ITEM}__embedding"] == wanted[version]
        return version

    shop.promote_under_load(request, threads=8 if shop.kind != "sqlite" else 1, turns=10)


def test_teardown_leaves_nothing(make_shop) -> None:
    """And a client that lives on sees the empty store, and then what is published into it."""
    for kind in KINDS:
        shop = make_shop(kind)
        living = shop.store()
        assert ask(living, everything(ITEM), item_id=[1])[f"{ITEM}__embedding?"] == ["PRESENT"]
        store = shop.store()
        store.write_to_online_store("item_clicks", clicks(1, datetime.now(UTC)))
        assert left(shop)
        store.teardown()
        assert left(shop) == []
        if kind != "sqlite":  # there the tables are gone
            assert ask(living, everything(ITEM), item_id=[1])[f"{ITEM}__embedding?"] == ["NOT_FOUND"]


def left(shop: Any) -> list[str]:
    """All that lies in the online store, found without kellm and Feast."""
    config = read_online_config(shop.repo)
    if config.kind == "sqlite":
        return sorted(path.name for path in (shop.repo / "data").glob("online.db*"))
    import redis

    address, _, options = config.connection_string.partition(",")
    client = redis.Redis(port=int(address.partition(":")[2]), db=int(options.partition("=")[2]))
    with client:
        return [key.decode(errors="replace") for key in client.scan_iter("*")]


def test_a_database_that_is_replaced_under_living_clients(make_shop) -> None:
    """By a backup, say: catalog, rows and vectors are then those of the new file, whose tables have the same names."""
    shop, other = make_shop("sqlite", versions=1), make_shop("sqlite", versions=1, seed_from=7)
    living, reader = shop.store(), EmbeddingReader.from_repo(shop.repo)
    ids = [1, 2]
    assert not np.array_equal(shop.vectors("v1", ids), other.vectors("v1", ids))
    for held in (shop, other):
        got = ask(living, everything(ITEM), item_id=ids)[f"{ITEM}__embedding"]
        np.testing.assert_array_equal(np.array(got, np.float32), held.vectors("v1", ids))
        np.testing.assert_array_equal(reader.get(ids).values, held.vectors("v1", ids))
        if held is shop:
            with contextlib.closing(sqlite3.connect(other.repo / "data" / "online.db")) as db:
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            for suffix in ("-wal", "-shm"):
                (shop.repo / "data" / f"online.db{suffix}").unlink(missing_ok=True)
            (other.repo / "data" / "online.db").replace(shop.repo / "data" / "online.db")
    reader.close()


def test_a_catalog_of_the_same_revision_is_another_one(make_shop) -> None:
    """A failover may lose the last promote, and the next one has its number: a live client must see the difference."""
    shop = make_shop("redis")
    shop.promote("v2")
    backend = open_backend(read_online_config(shop.repo))
    lost, living = backend.catalog(), shop.store()
    before = lost.model_copy(update={"revision": lost.revision - 1})
    assert ask(living, everything(ITEM), item_id=[2])[f"{ITEM}__embedding_version"] == ["v2"]
    other = before.promote("v1", datetime.now(UTC))
    assert other.revision == lost.revision
    assert backend.swap(lost, other)
    assert ask(living, everything(ITEM), item_id=[2])[f"{ITEM}__embedding_version"] == ["v1"]
    backend.close()
