"""What an epoch of joint training costs, beside a plain PyTorch loop; appends rows to benchmarks/data/train_speed.csv.

python benchmarks/bench_train.py --turns 2

Both train the same model, with text and the contrastive terms of both sides, on the same examples and batch size; see
`peers_train.py` for what the plain loop does. Without `--run` the interactions are MovieLens-100K's, and encodings and
pairs are random: they have the shapes of real ones (384 numbers, 20 neighbours), and the cost is the same. An epoch
to warm up goes before the one that is measured, and variants take turns, in another order every turn. Each process
has `--threads` threads; `cpu_s` is of all processes, and `ctr` the cross entropy of the measured epoch. With
`--device cuda` the machine's name ends in the GPU's; two ranks need two of them.

The contrastive term alone is another in `..._eager_loss`, plain PyTorch with all logits (`EagerInfoNCE`), and in
`..._torch_loss`, `AdapterInfoNCE(impl="torch")`; losses and gradients are first shown to agree on a batch. `ready...`
is `ours...` with its batches made, positives drawn and all of it on the device since the epoch before, so that forward,
backward and optimizer alone are measured. The term has a row for each distinct user, or item, of a batch:
MovieLens-100K has 943 and 1,682, however large the batch. `--catalogue N` makes up N users and N items, and needs no
data:

python benchmarks/bench_train.py --device cuda --catalogue 50000 --batch-size 16384 --examples 327680 --threads 8 \
    --backbone deepfm --impl ready --impl ready_eager_loss --impl ready_bfloat16 --impl ready_bfloat16_eager_loss
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
import torch.distributed as dist
from bench_place import append_rows, git_commit, processor, require_columns
from peers_train import EagerInfoNCE, PlainFeatures, PlainLoop
from torch import Tensor

from kellm_features.artifacts import require_artifact
from kellm_features.data import ingest
from kellm_features.schemas import INTERACTIONS, ITEM_ENCODINGS, ITEMS, USER_ENCODINGS, USERS, read_table
from kellm_features.settings import Settings, TrainSettings
from kellm_features.stages import StageContext
from kellm_features.training.data import CtrData, Examples, build_ctr_data
from kellm_features.training.device import take_gpu, training_device
from kellm_features.training.encodings import read_encodings
from kellm_features.training.knowledge import KnowledgeAugmented, Side
from kellm_features.training.loader import Batch, BatchLoader
from kellm_features.training.pairs import PositiveSampler, read_pairs
from kellm_features.training.ranks import Ranks, backend
from kellm_features.training.sides import SideBuilder
from kellm_features.training.stage import build_model
from kellm_features.training.trainer import Trainer
from kellm_features.usage import Usage, measure

OUT = Path(__file__).resolve().parent / "data" / "train_speed.csv"
COLUMNS = (
    "dataset examples items users max_history backbone impl batch_size workers ranks precision compile threads turn "
    "examples_s cpu_ms_per_example cpu_s wall_s peak_mib ctr machine cores memory_gib python torch commit date"
).split()
SIDES = ("user", "item")
SEED = 7
EAGER, TORCH, READY = "_eager_loss", "_torch_loss", "ready"
PLAIN: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain_workers_2": {"workers": 2},
    "ours": {},
    "ours_workers_1": {"workers": 1},
    "ours_workers_2": {"workers": 2},
    "ours_bfloat16": {"precision": "bfloat16"},
    "ours_compile": {"compile": True},
    "ours_ranks_2": {"ranks": 2},
}
"""What runs unless `--impl` names others."""
VARIANTS = PLAIN | {
    f"{kind}{form}{loss}": PLAIN[f"ours{form}"]
    for kind in ("ours", READY)
    for form in ("", "_bfloat16")
    for loss in ("", EAGER, TORCH)
}


@dataclass(frozen=True)
class World:
    """What all variants train on."""

    dataset: str
    data: CtrData
    encodings: dict[str, torch.Tensor]
    samplers: dict[str, PositiveSampler]


class TimedTrainer(Trainer):
    """Keeps what each epoch cost."""

    def _epoch(self, epoch: int, advance: Any) -> None:
        with measure() as self.usage:
            super()._epoch(epoch, advance)


class ReadyBatches(BatchLoader):
    """The batches of another loader, made and on the device."""

    def __init__(self, loader: BatchLoader, device: torch.device) -> None:
        self.rows = loader.rows
        self._batches = [
            batch._replace(features=batch.features.to(device), label=batch.label.to(device)) for batch in loader
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


class ReadySides(SideBuilder):
    """What another builder makes of a batch, made once."""

    def __init__(self, builder: SideBuilder) -> None:
        self.__dict__.update(builder.__dict__)
        self._made: dict[int, dict[str, Side]] = {}

    def of_batch(
        self, own: Mapping[str, Tensor], whole: Mapping[str, Tensor], generator: torch.Generator, **options: Any
    ) -> dict[str, Side]:
        batch = id(whole["user"])  # ready batches stay
        if batch not in self._made:
            self._made[batch] = super().of_batch(own, whole, generator, **options)
        return self._made[batch]


class ReadyTrainer(TimedTrainer):
    """Takes the batches and positives of the first epoch in all of them."""

    batches: ReadyBatches | None = None

    def _loader(self, epoch: int) -> BatchLoader:
        if self.batches is None:
            self.batches = ReadyBatches(super()._loader(epoch), self.device)
            self.sides = ReadySides(self.sides)
        return self.batches


def main() -> None:
    """Every variant in turn, for each backbone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run with ingest, swing and encode, instead of MovieLens-100K")
    parser.add_argument("--catalogue", type=int, help="make up so many users and items, instead of MovieLens-100K")
    parser.add_argument("--examples", type=int, default=20_480, help="train examples at most")
    parser.add_argument("--batch-size", type=int, default=TrainSettings().batch_size)
    parser.add_argument("--backbone", action="append", choices=["deepfm", "din", "dien"])
    parser.add_argument("--impl", action="append", choices=list(VARIANTS))
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each process that computes")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--commit", help="instead of asking git")
    parser.add_argument("--out", type=Path, default=OUT, help="CSV to append to")
    options = parser.parse_args()
    require_columns(options.out, COLUMNS)
    torch.set_num_threads(options.threads)
    world = read_world(options)
    place = {
        "machine": machine(options.device),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": options.commit or git_commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    impls = options.impl or list(PLAIN)
    for backbone in options.backbone or ["deepfm", "din", "dien"]:
        settings = train_settings(backbone, options.batch_size, options.device)
        require_equal(world, settings)
        for loss in (EAGER, TORCH):
            if any(impl.endswith(loss) for impl in impls):
                require_equal_losses(world, settings, loss)
        for turn in range(options.turns):
            for impl in impls if turn % 2 == 0 else impls[::-1]:
                settings = train_settings(backbone, options.batch_size, options.device, **VARIANTS[impl])
                row = run(impl, world, settings, options)
                row |= {"turn": turn + 1, "threads": options.threads, **place}
                print(*(f"{name} {row[name]}" for name in COLUMNS[5:20]), sep=", ", flush=True)
                append_rows(options.out, COLUMNS, [row])


def machine(device: str) -> str:
    """The processor, and the GPU where one is trained on."""
    return processor() if device == "cpu" else f"{processor()}, {torch.cuda.get_device_name(torch.device(device))}"


def train_settings(backbone: str, batch_size: int, device: str, **variant: Any) -> TrainSettings:
    """The paper's form: every step is a joint one, with a sum, of the user's and the item's vector side by side."""
    printed = {"schedule": "joint", "profile": True, "affinity": "none", "reduction": "sum", "weight": 0.004}
    fixed = {"epochs": 2, "patience": 0, "device": device}
    return TrainSettings(backbone=backbone, batch_size=batch_size, **printed, **fixed, **variant)


def read_world(options: argparse.Namespace) -> World:
    """Examples, encodings and samplers, cut to so many train examples and few to validate on."""
    run_dir = options.run
    data = build_ctr_data(
        *(invented(options.catalogue) if options.catalogue else read_tables(run_dir)),
        split="user",
        max_history=Settings().history.max_events,
        ties="shuffle",  # keeps targets, which is all that counts here
        seed=SEED,
    )
    data = replace(data, examples={part: head(rows, part, options.examples) for part, rows in data.examples.items()})
    if run_dir is None or options.catalogue:
        return World(f"made-up-{options.catalogue}" if options.catalogue else "ml-100k", data, *made_up(data))
    encoded, swing = (require_artifact(run_dir, stage, "train").path for stage in ("encode", "swing"))
    known = {"user": (data.user_ids, data.user_in_train), "item": (data.item_ids, data.item_in_train)}
    schemas = {"user": USER_ENCODINGS, "item": ITEM_ENCODINGS}
    top_k = TrainSettings().top_k
    return World(
        run_dir.name,
        data,
        {s: read_encodings(encoded / f"{s}_encodings.parquet", schemas[s], known[s][0]).vectors for s in SIDES},
        {s: read_pairs(swing / f"{s}_pairs.parquet", *known[s], f"{s}_id", top_k) for s in SIDES},
    )


def read_tables(run_dir: Path | None) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Interactions, items and users of a run, or MovieLens-100K's."""
    with tempfile.TemporaryDirectory() as folder:
        if run_dir is None:
            ingest.run(StageContext(Settings(), Path(folder), Path(folder), Path(folder), {}, {}, None))
        tables = Path(folder) if run_dir is None else require_artifact(run_dir, "ingest", "train").path
        return (
            read_table(tables / "interactions.parquet", INTERACTIONS),
            read_table(tables / "items.parquet", ITEMS),
            read_table(tables / "users.parquet", USERS),
        )


def invented(count: int) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Interactions, items and users: so many users with 30 events each, so many items, popular by 1/(rank + 33.5)."""
    rng = np.random.default_rng(SEED)
    events = 30 * count
    popularity = 1 / (np.arange(count) + 33.5)
    frame = pd.DataFrame(
        {
            "user_id": np.repeat(np.arange(count), 30),
            "item_id": rng.permutation(count)[rng.choice(count, events, p=popularity / popularity.sum())],
            "rating": np.float32(3),
            "liked": rng.random(events) < 0.5,
            "event_timestamp": pd.to_datetime(rng.integers(0, 10**9, events), unit="s", utc=True).as_unit("us"),
        }
    ).drop_duplicates(["user_id", "item_id"])
    parts = np.where(np.arange(count) % 20 == 0, "valid", np.where(np.arange(count) % 20 == 1, "test", "train"))
    frame["split"] = parts[frame["user_id"]]
    names = np.array([f"genre {number}" for number in range(18)])
    genres = [list(names[np.unique(row)]) for row in rng.integers(0, 18, (count, 2))]
    years = rng.integers(1930, 2000, count).astype(np.int32)
    items = pd.DataFrame({"item_id": np.arange(count), "title": "", "year": years, "genres": genres})
    users = pd.DataFrame({"user_id": np.arange(count)})
    for name, kinds in (("gender", 2), ("age", 7), ("occupation", 21)):
        users[name] = rng.integers(0, kinds, count).astype(str)
    interactions, items, users = (
        pa.Table.from_pandas(table[schema.names], schema=schema.arrow(), preserve_index=False)
        for table, schema in ((frame, INTERACTIONS), (items, ITEMS), (users, USERS))
    )
    return interactions, items, users


def head(rows: Examples, part: str, examples: int) -> Examples:
    """Validation belongs to an epoch of ours and not to the plain loop's: so few rows cost next to nothing."""
    count = examples if part == "train" else 256
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))[:count]
    return Examples(rows.user[chosen], rows.item[chosen], rows.label[chosen])


def made_up(data: CtrData) -> tuple[dict[str, torch.Tensor], dict[str, PositiveSampler]]:
    """Random encodings, and 20 random neighbours for each id with train rows."""
    rng = np.random.default_rng(SEED)
    encodings, samplers = {}, {}
    for side, in_train in (("user", data.user_in_train), ("item", data.item_in_train)):
        encodings[side] = torch.from_numpy(rng.normal(size=(len(in_train), 384)).astype(np.float32))
        ids = np.flatnonzero(in_train)
        anchors, neighbors = np.repeat(ids, 20), rng.choice(ids, 20 * len(ids))
        samplers[side] = PositiveSampler(anchors, neighbors, rng.random(len(anchors)) + 0.1, len(in_train), 20)
    return encodings, samplers


def model_of(world: World, settings: TrainSettings, impl: str = "ours") -> KnowledgeAugmented:
    """The model of all variants, with the same initial weights, and the contrastive term that this one has."""
    model = build_model(world.data, world.encodings, settings, SEED, gather=settings.ranks > 1)
    if impl.endswith(EAGER):
        model.contrast = EagerInfoNCE(temperature=settings.temperature, reduction=settings.reduction)
    elif impl.endswith(TORCH):
        model.contrast.impl = "torch"
    return model


def require_equal(world: World, settings: TrainSettings) -> None:
    """Both sides give the model the same features: equal logits where nothing is hidden."""
    model = model_of(world, settings).eval()
    rows = world.data.examples["valid"]
    ids = {"user": rows.user, "item": rows.item}
    encodings = {side: vectors[ids[side]] for side, vectors in world.encodings.items()}
    ours, plain = world.data.features(rows.user, rows.item), PlainFeatures(world.data)
    with torch.inference_mode():
        torch.testing.assert_close(
            model(ours, encodings), model(plain(rows.user, rows.item, training=False), encodings), rtol=1e-4, atol=1e-5
        )


def require_equal_losses(world: World, settings: TrainSettings, impl: str) -> None:
    """Another contrastive term gives the same value, embeddings and gradients on a batch, in float32."""
    device = training_device(settings)
    rows = world.data.examples["train"]
    ids = {"user": rows.user[: settings.batch_size], "item": rows.item[: settings.batch_size]}
    encodings = {side: vectors.to(device) for side, vectors in world.encodings.items()}
    builder = SideBuilder(encodings, world.samplers, SIDES, Ranks())
    sides = builder.of_batch(ids, ids, torch.Generator().manual_seed(SEED), contrast=True)
    ours, theirs = model_of(world, settings).to(device), model_of(world, settings, impl).to(device)
    for side in SIDES:
        found = []
        for model in (ours, theirs):
            term, z = model.contrastive(side, sides[side])
            weights = list(model.adapters[side].parameters())
            found.append((term, z, *torch.autograd.grad(term / len(z), weights)))
        for mine, other in zip(*found, strict=True):
            torch.testing.assert_close(other, mine, rtol=1e-3, atol=1e-3 * float(mine.detach().abs().max()))
        print(f"{impl.strip('_')}, {side}: {len(sides[side].positives)} rows, {found[1][0]:.6f} and {found[0][0]:.6f}")


def run(impl: str, world: World, settings: TrainSettings, options: argparse.Namespace) -> dict[str, Any]:
    """The cost of a variant's second epoch."""
    if impl.startswith("plain"):
        loop = PlainLoop(model_of(world, settings), world.data, world.encodings, world.samplers, settings, SEED)
        loop.epoch()
        with measure() as usage:
            ctr = loop.epoch()
        done = [(usage, ctr)]
    elif settings.ranks > 1:
        done = run_ranks(settings, options)
    else:
        done = [train(impl, world, settings, Ranks())]
    cpu_s, wall_s = sum(usage.cpu_seconds for usage, _ in done), max(usage.seconds for usage, _ in done)
    count = len(world.data.examples["train"])
    return {
        "dataset": world.dataset,
        "examples": count,
        "items": len(world.data.item_ids),
        "users": len(world.data.user_ids),
        "max_history": Settings().history.max_events,
        "backbone": settings.backbone,
        "impl": impl,
        **{name: getattr(settings, name) for name in ("batch_size", "workers", "ranks", "precision", "compile")},
        "examples_s": round(count / wall_s),
        "cpu_ms_per_example": round(1000 * cpu_s / count, 4),
        "cpu_s": round(cpu_s, 2),
        "wall_s": round(wall_s, 2),
        "peak_mib": round(sum(usage.peak_mib for usage, _ in done)),
        "ctr": round(done[0][1], 4),
    }


def train(impl: str, world: World, settings: TrainSettings, ranks: Ranks) -> tuple[Usage, float]:
    """Two epochs by the package's trainer: the cost of the second, and its cross entropy."""
    model = model_of(world, settings, impl)
    kind = ReadyTrainer if impl.startswith(READY) else TimedTrainer
    trainer = kind(model, world.data, world.encodings, world.samplers, settings, seed=SEED, ranks=ranks)
    history = trainer.fit()
    return trainer.usage, history.epochs[-1]["ctr"]


def run_ranks(settings: TrainSettings, options: argparse.Namespace) -> list[tuple[Usage, float]]:
    """The same on several ranks, each a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        with ProcessPoolExecutor(settings.ranks, mp_context=multiprocessing.get_context("spawn")) as pool:
            jobs = [pool.submit(rank, number, meeting, settings, options) for number in range(settings.ranks)]
            return [job.result() for job in jobs]


def rank(number: int, meeting: str, settings: TrainSettings, options: argparse.Namespace) -> tuple[Usage, float]:
    """One rank's part."""
    torch.set_num_threads(options.threads)
    world = read_world(options)
    device = take_gpu(settings, number)
    dist.init_process_group(backend(device), init_method=meeting, rank=number, world_size=settings.ranks)
    try:
        return train("ours", world, settings, Ranks.joined(device))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
