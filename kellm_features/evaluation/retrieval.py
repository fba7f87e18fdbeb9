"""The study of cold items' neighbours: baselines, text variants, controls, and what click training left behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kellm_features.evaluation.arms import all_texts, single_texts
from kellm_features.evaluation.bootstrap import ClusterBootstrap, Estimate, figures_of
from kellm_features.evaluation.cold import (
    LAMBDAS,
    LOG_WEIGHTS,
    TRUTHS,
    ColdRetrieval,
    ColdSplit,
    Retrieved,
    cold_retrieval,
    cosine,
    judge,
    knn_transfer,
    ridge_transfer,
    same_for_all,
    standardized,
    tune,
    with_degree,
)
from kellm_features.evaluation.cold_training import item_facts, noise, random_pairs, shuffled_rows, train_retrieval
from kellm_features.evaluation.experiment import Outcome
from kellm_features.evaluation.results import COLD, ResultRow, Suite
from kellm_features.evaluation.texts import TITLE, VARIANTS
from kellm_features.evaluation.world import FoldFiles, World
from kellm_features.progress import track
from kellm_features.schemas import INTERACTIONS, ITEMS, read_table

Vectors = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]
Scorer = Callable[[npt.NDArray[np.int64]], Scores]

METRIC_NAMES = {
    ("recall", "raw"): "recall@20",
    ("ndcg", "raw"): "ndcg@20",
    ("recall", "normalized"): "recall@20 normalized",
    ("ndcg", "normalized"): "ndcg@20 normalized",
}
FACTS = "facts"
POPULARITY = "popularity"


@dataclass(frozen=True)
class Scored:
    """One scorer, judged on the test items of every fold."""

    key: str
    label: str
    found: list[Retrieved]


def retrieval_texts(world: World) -> dict[str, str]:
    """Key -> the variants whose vectors stand side by side; keys are those of the ladder's arms where it has them."""
    variants = list(world.item_vectors)
    every = all_texts(variants)
    single = {arm.key: arm.key for arm in single_texts(variants)}
    side_by_side = every.text or ""
    return single | {
        f"{TITLE}+{FACTS}": f"{TITLE}+{FACTS}",
        every.key: side_by_side,
        f"{every.key}+{FACTS}": f"{side_by_side}+{FACTS}",
    }


def score_retrieval(world: World) -> list[ResultRow]:
    """Rows of the suite `retrieval`: every scorer on the test-cold items of every cold fold, set against popularity.

    `hubs` in a label is the log of the in-degree, `facts` are year and genres as numbers.

    A weight of popularity is chosen on validation-cold items, for each truth by itself. Everything that is trained sees
    the encodings of warm items, and their SWING rows by train users' likes, alone.
    """
    folds = [files for files in world.folds.values() if files.family == COLD]
    tasks = [task_of(world, files) for files in folds]
    scored: dict[str, Scored] = {}

    def add(key: str, label: str, found: Retrieved) -> None:
        scored.setdefault(key, Scored(key, label, [])).found.append(found)

    texts = retrieval_texts(world)
    with track("retrieval", len(tasks) * (len(texts) + 3), "trainings") as advance:
        for place, task in enumerate(tasks):
            add(POPULARITY, "popularity", _judged(task, _constant(task.degree)))
            add("in-degree", "hubs, by in-degree", _judged(task, _constant(task.in_degree)))
            for text, variants in texts.items():
                x = _encodings(world, variants)
                label = _label(variants)
                z = _adapted(task, x, seed=place)
                add(f"{text} raw", f"raw + λ·hubs: {label}", _with_hubs(task, _cosine(x)))
                add(
                    f"{text} knn",
                    f"kNN + λ·hubs: {label}",
                    _with_hubs(task, _knn(task, x)),
                )
                add(f"{text} ridge raw", f"ridge, raw: {label}", _ridge(task, standardized(task, x)))
                add(f"{text} cosine", f"adapted, cosine: {label}", _judged(task, _cosine(z)))
                add(f"{text} hubs", f"adapted + λ·hubs: {label}", _with_hubs(task, _cosine(z)))
                add(text, f"ridge, adapted: {label}", _ridge(task, z))
                advance(1, label)
            x = _encodings(world, list(texts.values())[-1])
            for key, label, inputs, targets in (
                ("random pairs", "control: random pairs", x, random_pairs(task, seed=place)),
                ("shuffled rows", "control: rows shuffled", shuffled_rows(x, seed=place), None),
                ("noise rows", "control: noise vectors", noise(x, seed=place), None),
            ):
                z = _adapted(task, inputs, seed=place, targets=targets)
                add(f"{key} cosine", f"{label}, cosine", _judged(task, _cosine(z)))
                add(key, f"{label}, ridge", _ridge(task, z))
                advance(1, label)
    references = {key: (POPULARITY,) for key in scored if key != POPULARITY}
    return _rows(world, tasks, list(scored.values()), "retrieval", "", references)


def score_forms(
    world: World,
    backbone: str,
    outcomes: Mapping[str, tuple[str, Sequence[Outcome]]],
    references: Mapping[str, Sequence[str]],
) -> list[ResultRow]:
    """Rows of the suite `contrastive`: what the item embeddings of each form retrieve, against the form without.

    Hubs, whose weight each form may choose, are told by SWING among train users' likes of warm items.

    Args:
        world: the evaluation.
        backbone: that was trained with them.
        outcomes: key of a form -> its label, and its trainings on all cold folds from the first seed.
        references: as in `score_study`: what the form's clicks are set against.
    """
    folds = {files.name: files for files in world.folds.values() if files.family == COLD}
    tasks = {name: task_of(world, files) for name, files in folds.items()}
    scored = []
    for key, (label, trainings) in outcomes.items():
        found = []
        for outcome in trainings:
            task = tasks[outcome.cell.fold]
            found.append(_with_hubs(task, _cosine(outcome.item_embeddings())))
        scored.append(Scored(key, label, found))
    used = [tasks[outcome.cell.fold] for outcome in next(iter(outcomes.values()))[1]]
    return _rows(world, used, scored, "contrastive", backbone, references)


def task_of(world: World, files: FoldFiles) -> ColdRetrieval:
    """The retrieval task of a cold fold: its cold items, and who trains.

    The truth is of all users' likes; what trains sees those that the fold's train rows hold.
    """
    run = world.run_dir / "ingest"
    ids = read_table(world.items(), ITEMS)["item_id"].to_numpy()
    table = read_table(run / "interactions.parquet", INTERACTIONS).select(["user_id", "item_id", "liked"]).to_pandas()
    likes = table[table["liked"]]
    told = json.loads((files.folder / "fold.json").read_text(encoding="utf-8"))
    valid, test = (np.flatnonzero(np.isin(ids, np.asarray(told[name]))) for name in ("cold_valid", "cold_test"))
    parts = read_table(files.folder / "interactions.parquet", INTERACTIONS).select(["user_id", "split"]).to_pandas()
    trains = likes["user_id"].isin(parts.loc[parts["split"].eq("train"), "user_id"])
    user, item = np.unique(likes["user_id"], return_inverse=True)[1], np.searchsorted(ids, likes["item_id"].to_numpy())
    return cold_retrieval(user, item, trains, ColdSplit(valid, test, len(ids)))


def _encodings(world: World, text: str) -> Vectors:
    parts: list[npt.NDArray[Any]] = []
    for name in text.split("+"):
        if name == FACTS:
            items = read_table(world.items(), ITEMS)
            parts.append(item_facts(items["year"].to_pylist(), [row or [] for row in items["genres"].to_pylist()]))
        else:
            parts.append(np.load(world.root / "vectors" / world.item_vectors[name]))
    return np.concatenate(parts, axis=1).astype(np.float32)


def _adapted(task: ColdRetrieval, x: Vectors, *, seed: int, targets: npt.NDArray[np.float32] | None = None) -> Vectors:
    adapter = train_retrieval(task, x, seed=seed, targets=targets)
    with torch.inference_mode():
        z: Vectors = adapter(torch.from_numpy(x)).numpy()
    return z


def _constant(values: npt.NDArray[np.generic]) -> Scorer:
    return lambda items: same_for_all(items, values)


def _cosine(vectors: npt.NDArray[np.floating]) -> Scorer:
    return lambda items: cosine(vectors, items)


def _knn(task: ColdRetrieval, vectors: npt.NDArray[np.floating]) -> Scorer:
    return lambda items: knn_transfer(task, vectors, items)


def _judged(task: ColdRetrieval, scorer: Scorer) -> Retrieved:
    return judge(task, task.split.test, scorer(task.split.test))


def _with_hubs(task: ColdRetrieval, scorer: Scorer) -> Retrieved:
    return _tuned(task, scorer, task.log_in_degree, LAMBDAS)


def _ridge(task: ColdRetrieval, vectors: npt.NDArray[np.floating]) -> Retrieved:
    return _tuned(task, lambda items: ridge_transfer(task, vectors, items), task.log_degree, LOG_WEIGHTS)


def _tuned(task: ColdRetrieval, scorer: Scorer, degree: Scores, weights: Sequence[float]) -> Retrieved:
    """Each truth with the weight of the degree that serves it best on validation items."""
    scores = scorer(task.split.test)
    found = {}
    for truth in TRUTHS:
        weight = tune(task, scorer, degree, truths=(truth,), weights=weights)
        found[truth] = judge(task, task.split.test, with_degree(scores, degree, weight))
    return Retrieved(
        recall={truth: judged.recall[truth] for truth, judged in found.items()},
        ndcg={truth: judged.ndcg[truth] for truth, judged in found.items()},
    )


def _label(variants: str) -> str:
    """Short, as it stands beside a bar: what all texts are, the ladder tells."""
    names = VARIANTS | {FACTS: "facts"}
    parts = variants.split("+")
    texts = [name for name in parts if name != FACTS]
    told = ["all texts"] if len(texts) > 1 else [names[name] for name in texts]
    return ", ".join(told + ["facts"] * (FACTS in parts))


def _rows(
    world: World,
    tasks: Sequence[ColdRetrieval],
    scored: Sequence[Scored],
    suite: Suite,
    backbone: str,
    references: Mapping[str, Sequence[str]],
) -> list[ResultRow]:
    items = np.concatenate([task.split.test for task in tasks])
    group = np.repeat(np.arange(len(tasks)), [len(task.split.test) for task in tasks])
    draws = ClusterBootstrap(items, world.settings.evaluate.samples, world.settings.run.seed, group)
    rows = []
    for (kind, truth), metric in METRIC_NAMES.items():
        estimates: dict[str, Estimate] = {}
        for one in scored:
            values = np.concatenate([getattr(judged, kind)[truth] for judged in one.found])
            has_neighbors = ~np.isnan(values)
            estimates[one.key] = draws.mean(np.nan_to_num(values), has_neighbors)
        judged = items[has_neighbors]  # an item has neighbours or not, whoever names them
        for one in scored:
            for reference in references.get(one.key) or [""]:
                rows.append(_row(estimates, one, metric, reference, suite, backbone, len(tasks), judged))
    return rows


def _row(
    estimates: Mapping[str, Estimate],
    one: Scored,
    metric: str,
    reference: str,
    suite: Suite,
    backbone: str,
    folds: int,
    items: npt.NDArray[np.int64],
) -> ResultRow:
    return ResultRow.model_validate(
        {
            "suite": suite,
            "split": COLD,
            "backbone": backbone,
            "arm": one.key,
            "label": one.label,
            "metric": metric,
            "slice": COLD,
            "reference": reference,
            "examples": len(items),
            "clusters": len(np.unique(items)),
            "cluster": "item",
            "folds": folds,
            "seeds": 1,
            **figures_of(estimates[one.key], estimates[reference] if reference else None),
        }
    )


def of_first_seed(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """One training per fold: what retrieval is told of."""
    return [outcome for outcome in outcomes if outcome.cell.seed == 0]
