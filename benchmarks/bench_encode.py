"""What encoding costs, beside SentenceTransformer.encode on the same texts; appends rows to benchmarks/data/encode.csv.

python benchmarks/bench_encode.py --turns 2

The texts are the leads and sections of the sample Wikipedia's pages, cut at 150 words, each begun with its page's
title. sentence_transformers: its own encode, which uses all threads for one batch. ours: batches side by side, each on
its share of the threads. ours_pool: `encode.devices`, with its processes up before the clock starts; `start_s` is what
that took. `cpu_s` is of the process and its children; `min_cosine` is to the vectors of sentence_transformers in
float32.
"""

from __future__ import annotations

import argparse
import bz2
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
from bench_place import append_rows, provenance

from kellm_features.knowledge.encoder import Encoder, encoder_folder
from kellm_features.resources import mini_wiki_dump
from kellm_features.settings import EncodeSettings
from kellm_features.usage import measure
from kellm_spark.wikitext import parse_article

OUT = Path(__file__).resolve().parent / "data" / "encode.csv"
COLUMNS = (
    "model texts words_p50 impl dtype processes batch_size turn texts_s cpu_s wall_s start_s min_cosine "
    "machine cores memory_gib python torch sentence_transformers commit date"
).split()
WORDS = 150
IMPLS = {
    "sentence_transformers": {},
    "ours": {},
    "ours_pool": {"devices": ["cpu", "cpu"]},
    "ours_bfloat16": {"dtype": "bfloat16"},
    "ours_float16": {"dtype": "float16"},
}
Encode = Callable[[list[str]], npt.NDArray[np.float32]]


def main() -> None:
    """Every implementation in turn, in another order every turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=192)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--impl", action="append", choices=list(IMPLS))
    parser.add_argument("--model", default=EncodeSettings().model)
    parser.add_argument("--commit", help="instead of asking git")
    options = parser.parse_args()
    texts = read_texts(options.texts)
    with encoder("sentence_transformers", options.model) as encode:
        expected = encode(texts)
    told = provenance("torch", "sentence-transformers", commit=options.commit)
    impls = options.impl or list(IMPLS)
    for turn in range(options.turns):
        for impl in impls if turn % 2 == 0 else impls[::-1]:
            row = run(impl, options.model, texts, expected)
            row |= {"model": options.model, "impl": impl, "turn": turn + 1, **told}
            print(*(f"{name} {row[name]}" for name in COLUMNS[1:13]), sep=", ", flush=True)
            append_rows(OUT, COLUMNS, [row])


def read_texts(count: int) -> list[str]:
    """Texts of the sample Wikipedia, in the dump's order."""
    texts = []
    title = ""
    with bz2.open(mini_wiki_dump()) as dump:
        for _, element in ElementTree.iterparse(dump):
            tag = element.tag.rpartition("}")[2]
            if tag == "title":
                title = element.text or ""
            elif tag == "text" and element.text:
                article = parse_article(element.text)
                for text in (article.lead, *(text for _, text in article.sections)):
                    words = text.split()
                    if len(words) >= 10:
                        texts.append(" ".join([f"{title}.", *words[:WORDS]]))
    if len(texts) < count:
        raise SystemExit(f"--texts {count}: the sample Wikipedia has {len(texts)}")
    return texts[:count]


@contextmanager
def encoder(impl: str, model: str) -> Iterator[Encode]:
    """What turns texts to vectors."""
    settings = EncodeSettings(model=model, device="cpu", **IMPLS[impl])
    if impl == "sentence_transformers":
        from sentence_transformers import SentenceTransformer

        peer: Any = SentenceTransformer(str(encoder_folder(settings)), device="cpu", local_files_only=True)
        yield lambda texts: peer.encode(texts, batch_size=settings.batch_size, show_progress_bar=False)
        return
    with Encoder(settings) as ours:
        yield ours.encode


def run(impl: str, model: str, texts: list[str], expected: npt.NDArray[np.float32]) -> dict[str, Any]:
    """The cost of encoding the texts once, after a first text that starts what has to be started."""
    with encoder(impl, model) as encode:
        started = time.perf_counter()
        encode(texts[:4])
        start_s = time.perf_counter() - started
        with measure() as usage:
            vectors = encode(texts)
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(expected, axis=1)
    settings = EncodeSettings(**IMPLS[impl])
    return {
        "texts": len(texts),
        "words_p50": int(np.median([len(text.split()) for text in texts])),
        "dtype": settings.dtype,
        "processes": len(settings.devices or [0]),
        "batch_size": settings.batch_size,
        "texts_s": round(len(texts) / usage.seconds, 1),
        "cpu_s": round(usage.cpu_seconds, 2),
        "wall_s": round(usage.seconds, 2),
        "start_s": round(start_s, 2),
        "min_cosine": round(float(((vectors * expected).sum(axis=1) / norms).min()), 7),
    }


if __name__ == "__main__":
    main()
