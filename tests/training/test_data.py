"""What a batch holds, worked by hand on six items and four users; and what training hides of it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from kellm_features.training import data as module
from kellm_features.training.data import HISTORY_DROPOUT, ID_DROPOUT
from kellm_features.training.features import DISLIKED, LIKED, Bag, Features
from tests.training import small
from tests.training.small import EVENTS, GENRE_ROWS, GENRES, ITEM_IDS, ROWS, flat, small_data


def held(bag: Bag, row: int) -> dict[int, float]:
    """Id -> weight of one example."""
    sums: dict[int, float] = {}
    for i, weight in zip(bag.ids[row].tolist(), bag.weights[row].tolist(), strict=True):
        if weight:
            sums[i] = sums.get(i, 0) + weight
    return sums


def test_fields_by_hand() -> None:
    features = small_data().features(torch.tensor([1, 0, 3]), torch.tensor([4, 2, 0]))
    expected: dict[str, list[dict[int, float]]] = {
        "item": [{0: 1}, {3: 1}, {1: 1}],
        "genres": [{}, {2: 1}, {1: 0.5, 2: 0.5}],
        "year": [{0: 1}, {0: 1}, {2: 1}],  # 1970 has no train rows, item 30 no year
        "gender": [{0: 1}, {1: 1}, {0: 1}],  # M has no train rows
        "age": [{1: 1}] * 3,
        "occupation": [{0: 1}, {1: 1}, {1: 1}],
        "history_liked": [{2: 1}, {1: 0.5, 3: 0.5}, {}],
        "history_disliked": [{1: 1}, {2: 1}, {}],
        "history_flags": [{LIKED: 2 / 3, DISLIKED: 1 / 3}] * 2 + [{}],
        "history_liked_genres": [{1: 1}, {1: 0.25, 2: 0.75}, {}],  # item 50 has no known genre
        "history_disliked_genres": [{1: 0.5, 2: 0.5}, {1: 1}, {}],
    }
    assert list(features.fields) == list(module.FIELDS)
    for name, rows in expected.items():
        for row, weights in enumerate(rows):
            assert held(features.fields[name], row) == pytest.approx(weights), (name, row)
    for bag in (*features.fields.values(), *features.items.values()):
        assert (bag.ids.dtype, bag.weights.dtype) == (torch.int64, torch.float32)
        assert bag.ids.shape == bag.weights.shape


def test_sequences_by_hand() -> None:
    features = small_data().features(torch.tensor([1, 0, 3, 2]), torch.tensor([4, 2, 0, 4]))
    # Targets 50, 30, 10 and 50; histories 50 20 10, 10 20 30, none, and 40: items 10, 20, 30, 40, 50.
    assert features.items["item"].ids.tolist() == [[1], [2], [3], [4], [0]]
    assert [held(features.items["genres"], row) for row in range(5)] == [{1: 0.5, 2: 0.5}, {1: 1}, {2: 1}, {}, {}]
    assert features.target.tolist() == [4, 2, 0, 4]
    assert features.history.tolist() == [[4, 1, 0], [0, 1, 2], [0, 0, 0], [3, 0, 0]]
    assert features.flags.tolist() == [[1, 1, 2], [1, 2, 1], [0, 0, 0], [1, 0, 0]]
    assert features.places.tolist() == [[5, 2, 1], [1, 2, 3], [0, 0, 0], [4, 0, 0]]


def test_examples_counts_and_likes_by_hand() -> None:
    data = small_data()
    assert [data.examples[part].item.tolist() for part in ("train", "valid", "test")] == [[3, 5], [2, 3], [4]]
    assert data.item_count.tolist() == [1, 1, 1, 1, 0, 1]
    assert data.history_length.tolist() == [3, 3, 1, 0]
    assert data.train_likes["item"].tolist() == [1, 0, 1, 1, 0, 0]
    assert data.train_likes["user"].tolist() == [3, 0, 0, 0]
    assert data.table_rows == {"item": 6, "genre": 4, "year": 3, "gender": 2, "age": 2, "occupation": 2, "flag": 3}
    assert data.vocabularies["year"] == ["1980", "1990"]


def test_a_shorter_history_has_the_same_targets() -> None:
    whole, last = small_data(), small_data(seen_history=1)
    for part, examples in whole.examples.items():
        assert examples.item.tolist() == last.examples[part].item.tolist()
    features = last.features(torch.tensor([0, 1, 2]), torch.tensor([3, 3, 3]))
    assert features.flags.tolist() == [[LIKED], [DISLIKED], [LIKED]]
    assert features.items["item"].ids[features.history].flatten().tolist() == [3, 1, 4]
    assert held(features.fields["history_flags"], 1) == {DISLIKED: 1}
    assert last.history_length.tolist() == whole.history_length.tolist()
    for wrong in (0, 4):
        with pytest.raises(ValueError, match=f"seen_history={wrong} .* max_history=3"):
            small_data(seen_history=wrong)


def recomputed(features: Features, user: int, row: int) -> dict[str, dict[int, float]]:
    """The history's bags, from the events that the flags of one example show."""
    events = EVENTS[user + 1][1][:3]
    bags: dict[str, dict[int, float]] = {}
    for name, liked in (("liked", 1), ("disliked", 0)):
        seen = [i for (i, y), flag in zip(events, features.flags[row].tolist(), strict=True) if flag and y == liked]
        ids, genres = np.zeros(6), np.zeros(4)
        for item in seen:
            at = ITEM_IDS.index(item)
            ids[ROWS[at]] += 1
            for genre in GENRES[at]:
                genres[GENRE_ROWS.get(genre, 0)] += 1 / len(GENRES[at])
        for field, counts in ((f"history_{name}", ids), (f"history_{name}_genres", genres)):
            counts[0] = 0
            bags[field] = {i: c / counts.sum() for i, c in enumerate(counts) if c}
    return bags


def test_training_hides_ids_and_events() -> None:
    data, count = small_data(), 4000
    user, item = torch.arange(count) % 2, torch.arange(count) % 6
    features = data.features(user, item, torch.Generator().manual_seed(3))
    shown = features.items["item"].ids[features.target, 0]
    hidden = shown != torch.tensor(ROWS)[item]
    known = item != 4
    share = hidden[known].float().mean().item()
    assert abs(share - ID_DROPOUT) < 5 * (ID_DROPOUT * (1 - ID_DROPOUT) / known.sum().item()) ** 0.5
    assert shown[hidden].unique().tolist() == [0]
    assert torch.equal(features.fields["item"].ids[:, 0], shown)
    # What is known of the item beside its id stays.
    genres = data.features(user, item).fields["genres"]
    for found in (features.fields["genres"], features.items["genres"]):
        at = slice(None) if len(found.ids) == count else features.target
        assert torch.equal(found.ids[at], genres.ids)
        assert torch.equal(found.weights[at], genres.weights)

    visible = (features.flags > 0).float().mean().item()
    assert abs(visible - (1 - HISTORY_DROPOUT)) < 5 * 0.5 / (3 * count) ** 0.5
    assert (features.history[features.flags == 0] == 0).all()
    assert torch.equal(features.places > 0, features.flags > 0)
    for row in range(60):
        events = EVENTS[int(user[row]) + 1][1][:3]
        for place, flag in enumerate(features.flags[row].tolist()):
            assert flag in (0, LIKED if events[place][1] else DISLIKED)
            if flag:
                at = features.history[row, place]
                assert features.items["item"].ids[at].item() == ROWS[ITEM_IDS.index(events[place][0])]
        for name, expected in recomputed(features, int(user[row]), row).items():
            assert held(features.fields[name], row) == pytest.approx(expected), name
        assert held(features.fields["history_flags"], row) == pytest.approx({LIKED: 2 / 3, DISLIKED: 1 / 3})


@pytest.mark.parametrize("training", [False, True])
def test_parts_are_together_the_whole(training: bool) -> None:
    data, count = small_data(), 101
    user, item = torch.arange(count) % 4, torch.arange(count) % 6

    def generator() -> torch.Generator | None:
        return torch.Generator().manual_seed(1) if training else None

    whole = flat(data.features(user, item, generator()))
    bounds = (0, 0, 33, 101)
    parts = [
        flat(data.features(user, item, generator(), slice(start, stop))) for start, stop in itertools.pairwise(bounds)
    ]
    for name, values in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), values), name


@pytest.mark.parametrize("training", [False, True])
def test_both_ways_to_find_distinct_items_agree(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data, seen = small_data(), []
    user, item = torch.arange(50) % 4, torch.arange(50) % 5
    for factor in (0, 1000):
        monkeypatch.setattr(module, "_SCATTER_UP_TO", factor)
        seen.append(data.features(user, item, torch.Generator().manual_seed(1) if training else None))
    for name in ("target", "history", "flags"):
        assert torch.equal(getattr(seen[0], name), getattr(seen[1], name))
    for name in ("item", "genres"):
        assert torch.equal(seen[0].items[name].ids, seen[1].items[name].ids)


def test_rare_genres_are_left_out_of_histories_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HISTORY_GENRES", 2)  # A stands at three items, B at two, D at one
    fields = small_data().features(torch.tensor([0]), torch.tensor([5])).fields
    assert fields["history_liked_genres"].ids.tolist() == [[1, 2]]
    assert held(fields["genres"], 0) == {1: 0.5, 3: 0.5}


def test_a_catalogue_without_genres(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "GENRES", [[] for _ in ITEM_IDS])
    features = small_data().features(torch.tensor([0]), torch.tensor([3]))
    for bag in (features.fields["history_liked_genres"], features.fields["genres"], features.items["genres"]):
        assert bag.weights.count_nonzero() == 0
