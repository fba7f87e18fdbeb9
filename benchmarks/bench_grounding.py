"""Grounding scores on real descriptions and pages; appends rows to benchmarks/data/grounding_*.csv.

python benchmarks/bench_grounding.py --run DIR [--descriptions texts.json --model NAME] [--worst 20]

`--run` is a run's folder, finished up to `link`; the descriptions are {item id: text}, by a model that saw no page.
Without them they are those that the run's own model wrote from the page, so that it has to be finished up to
`generate`. Of a seeded sample of linked items, texts of three kinds are scored: `closed-book` or `from page`, the
descriptions; `template`, the template engine's; `extract`, the first sentences of the page itself.

grounding_auc.csv: each text against its own source and against another's. `other`: of any other item in the sample;
`same year`, `same genre`: one that shares the year, or a genre; `wrong link`: its own title and genres with another's
page. `auc` is that of right over wrong; `right_pass` and `wrong_pass` are the shares that reach --threshold, and
`no_claims` is that of texts in which nothing can be looked up. Beside the score stand two simpler ones: the share of
a text's words (`words`), and of its words with a capital (`capitals`), that the source has.

grounding_swaps.csv: in each text a random name of two words or more, or a random year, is replaced by one from
another item's text, where it stands (`one`) or wherever it stands (`all`). The names are those of a pattern of this
script's own. `lowered` is the share of swaps after which the score is lower; `stood`: whether the source has what
was replaced.

grounding_cost.csv: CPU milliseconds per text, against pages drawn out to --page-kb, the source prepared before or not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from bench_place import append_rows, provenance
from sklearn.metrics import roc_auc_score

from kellm_features.knowledge.claims import find_claims
from kellm_features.knowledge.domain import load_domain
from kellm_features.knowledge.engines.template import describe_item
from kellm_features.knowledge.facts import Page, item_facts
from kellm_features.knowledge.grounding import Source, grounding, grounding_score, source_text
from kellm_features.knowledge.text import cut_to_tokens, titled

DATA = Path(__file__).resolve().parent / "data"
PLACE = ["machine", "python", "commit", "date"]
TOKENS = 120
SWAPS_PER_TEXT = 5
NAME = re.compile(r"\b[A-Z][a-z]+(?: [A-Z][a-z]+)+\b")
YEAR = re.compile(r"\b(?:19|20)\d\d\b")
WORD = re.compile(r"\w+")
CAPITAL = re.compile(r"\b[A-Z]\w*")


@dataclass(frozen=True)
class Item:
    """One linked item: catalogue, page, texts by kind."""

    item_id: str
    title: str
    year: int | None
    genres: tuple[str, ...]
    page: Page
    texts: dict[str, str]

    def source(self, page: Page | None = None) -> str:
        """What its description may draw on, with its own page or another's."""
        return source_text(titled(self.title, self.year), self.genres, [page or self.page])


def main() -> None:
    """Run all three and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path)
    parser.add_argument("--descriptions", type=Path)
    parser.add_argument("--model", default="", help="that wrote the descriptions; default: as the run says")
    parser.add_argument("--domain", default="movies")
    parser.add_argument("--dataset", default="ml-1m", help="name of the catalogue in the rows")
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--page-kb", type=int, default=20)
    parser.add_argument("--worst", type=int, default=0, help="print this many of the worst descriptions")
    options = parser.parse_args()
    written, descriptions, model = texts_of(options)
    sample = read(options, written, descriptions)
    told = provenance()
    fixed = {"dataset": options.dataset, "model": model, "items": len(sample), "seed": options.seed}
    fixed |= {name: told[name] for name in PLACE}
    for name, rows in (
        ("auc", right_and_wrong(sample, options.threshold, random.Random(options.seed))),
        ("swaps", swapped(sample, random.Random(options.seed))),
        ("cost", cost(sample, options.page_kb)),
    ):
        full = [{**row, **fixed} for row in rows]
        append_rows(DATA / f"grounding_{name}.csv", list(full[0]), full)
        print(pd.DataFrame(rows).to_string(index=False), end="\n\n")
    by_score = sorted(sample, key=lambda item: grounding_score(item.texts[written], item.source()))
    for item in by_score[: options.worst]:
        text = item.texts[written]
        found = grounding(text, item.source())
        print(f"{item.item_id} {titled(item.title, item.year)}: {found.score:.2f} of {found.claims}")
        print(*(f"    {claim.kind} {text[claim.start : claim.end]}" for claim in found.unsupported), sep="\n")


def texts_of(options: argparse.Namespace) -> tuple[str, dict[str, str], str]:
    """What kind of descriptions they are, the texts by item id, and the model that wrote them."""
    if options.descriptions:
        return "closed-book", json.loads(options.descriptions.read_text(encoding="utf-8")), options.model
    made = pd.read_parquet(options.run / "generate" / "item_descriptions.parquet")
    made = made[made["description_source"] == "llm"]
    texts = dict(zip(made["item_id"].astype(str), made["description"], strict=True))
    return "from page", texts, options.model or ", ".join(sorted(set(made["model_id"])))


def read(options: argparse.Namespace, written: str, descriptions: dict[str, str]) -> list[Item]:
    """A seeded sample of the linked items that have a description."""
    links = pd.read_parquet(options.run / "link" / "links.parquet").dropna(subset="wiki_page_id")
    links = links[[bool(descriptions.get(str(i), "").strip()) for i in links["item_id"]]].sort_values("item_id")
    count = min(options.items, len(links))
    links = links.iloc[sorted(random.Random(options.seed).sample(range(len(links)), count))]
    items = pd.read_parquet(options.run / "ingest" / "items.parquet").set_index("item_id")
    pages = pd.read_parquet(options.run / "wiki" / "pages.parquet").set_index("wiki_page_id")
    domain = load_domain(options.domain)
    sample = []
    for item_id, page_id in zip(links["item_id"], links["wiki_page_id"].astype(int), strict=True):
        row, of = items.loc[item_id], pages.loc[page_id]
        page = Page(of["wiki_title"], of["lead"], tuple((part["name"], part["text"]) for part in of["sections"]))
        year = None if pd.isna(row["year"]) else int(row["year"])
        facts = item_facts(domain, row["title"], year, tuple(row["genres"]), [page])
        texts = {
            written: descriptions[str(item_id)],
            "template": describe_item(facts, TOKENS),
            "extract": cut_to_tokens(page.lead, TOKENS),
        }
        sample.append(Item(str(item_id), row["title"], year, tuple(row["genres"]), page, texts))
    return sample


def words(text: str, source: str) -> float:
    """Share of a text's words that the source has."""
    return share(WORD.findall(text.casefold()), WORD.findall(source.casefold()))


def capitals(text: str, source: str) -> float:
    """Share of a text's capitalised words that the source has."""
    return share(CAPITAL.findall(text), CAPITAL.findall(source))


def share(of: Sequence[str], known: Sequence[str]) -> float:
    """Share of distinct words that are known."""
    return len(set(of) & set(known)) / max(1, len(set(of)))


def right_and_wrong(sample: Sequence[Item], threshold: float, rng: random.Random) -> list[dict[str, object]]:
    """AUC and quantiles by kind of text, kind of wrong source, and measure."""
    shuffled = list(sample)
    rng.shuffle(shuffled)
    # One place on in a shuffled circle: nobody meets himself, everybody is met once.
    other = {a.item_id: b for a, b in zip(shuffled, shuffled[1:] + shuffled[:1], strict=True)}

    def like(item: Item, alike: Callable[[Item], bool]) -> Item | None:
        found = [b for b in sample if b is not item and alike(b)]
        return rng.choice(found) if found else None

    year = {a.item_id: like(a, lambda b, a=a: b.year == a.year) for a in sample}
    genre = {a.item_id: like(a, lambda b, a=a: bool(set(a.genres) & set(b.genres))) for a in sample}
    sources: dict[str, dict[str, str]] = {
        "other": {i: b.source() for i, b in other.items()},
        "same year": {i: b.source() for i, b in year.items() if b},
        "same genre": {i: b.source() for i, b in genre.items() if b},
        "wrong link": {a.item_id: a.source(other[a.item_id].page) for a in sample},
    }
    rows: list[dict[str, object]] = []
    for kind in sample[0].texts:
        for case, wrong_source in sources.items():
            judged = [item for item in sample if item.item_id in wrong_source]
            for measure in (grounding_score, words, capitals):
                right = [measure(item.texts[kind], item.source()) for item in judged]
                wrong = [measure(item.texts[kind], wrong_source[item.item_id]) for item in judged]
                auc = roc_auc_score([1] * len(right) + [0] * len(wrong), right + wrong)
                row: dict[str, object] = {"text": kind, "wrong": case, "measure": measure.__name__}
                row |= {"threshold": threshold, "n": len(judged), "auc": round(float(auc), 5)}
                for name, scores in (("right", right), ("wrong", wrong)):
                    for q in (1, 5, 50, 95, 99):
                        row[f"{name}_p{q}"] = round(float(np.percentile(scores, q)), 3)
                    row[f"{name}_pass"] = round(float(np.mean(np.array(scores) >= threshold)), 3)
                row["no_claims"] = round(float(np.mean([not find_claims(i.texts[kind]) for i in judged])), 3)
                rows.append(row)
    return rows


def swapped(sample: Sequence[Item], rng: random.Random) -> list[dict[str, object]]:
    """Share of swaps that lower the score, by kind of text, what is swapped, and whether it stood in the source."""
    rows: list[dict[str, object]] = []
    for kind in sample[0].texts:
        for what, pattern in (("name", NAME), ("year", YEAR)):
            for where in ("one", "all"):
                seen = [swap for item in sample for swap in swaps(item, sample, kind, pattern, where, rng)]
                for stood in ("any", "yes", "no"):
                    kept = [low for low, had in seen if stood in ("any", "yes" if had else "no")]
                    if kept:
                        row = {"text": kind, "swapped": what, "where": where, "stood": stood, "n": len(kept)}
                        rows.append({**row, "lowered": round(float(np.mean(kept)), 4)})
    return rows


def swaps(
    item: Item, sample: Sequence[Item], kind: str, pattern: re.Pattern[str], where: str, rng: random.Random
) -> list[tuple[bool, bool]]:
    """Of some random swaps in one text: was the score lower, and did what was replaced stand in the source?"""
    text, source = item.texts[kind], item.source()
    before = grounding_score(text, source)
    found = list(pattern.finditer(text))
    outcomes = []
    for match in rng.sample(found, min(SWAPS_PER_TEXT, len(found))):
        new = match[0]
        while new in text:  # another film's, that this text does not name
            donor = rng.choice(sample)
            new = rng.choice([m[0] for m in pattern.finditer(donor.texts[kind])] or [match[0]])
        one = text[: match.start()] + new + text[match.end() :]
        changed = one if where == "one" else text.replace(match[0], new)
        outcomes.append((grounding_score(changed, source) < before, match[0] in source))
    return outcomes


def cost(sample: Sequence[Item], page_kb: int) -> list[dict[str, object]]:
    """CPU milliseconds per description, best of five rounds."""
    everything = " ".join(item.source() for item in sample)
    texts = [next(iter(item.texts.values())) for item in sample]
    pages = [(item.source() + " " + everything)[: page_kb * 1000] for item in sample]
    prepared = [Source(page) for page in pages]
    rows: list[dict[str, object]] = []
    for name, sources in (("text", pages), ("prepared", prepared)):
        rounds = []
        for _ in range(5):
            start = time.process_time()
            for text, source in zip(texts, sources, strict=True):
                grounding_score(text, source)
            rounds.append((time.process_time() - start) / len(texts) * 1e3)
        row = {"source": name, "page_kb": page_kb, "mean_text_chars": round(float(np.mean([len(t) for t in texts])))}
        rows.append({**row, "cpu_ms": round(min(rounds), 3), "cores": os.cpu_count()})
    return rows


if __name__ == "__main__":
    main()
