"""Right links of both methods against independent gold; appends rows to benchmarks/data/link_methods.csv.

python benchmarks/bench_link.py --catalogue movies.dat --wiki DIR --gold gold.tsv [--disagreements out.csv]

The gold is tab-separated without a header: item id, title, and the page as a title or as a DBpedia or Wikipedia
address. An item is judged where its gold page is among the pages, is of the domain's kind, and is no more than
--years from the item: gold whose year contradicts the catalogue is not believed. Titles that differ in nothing but the
disambiguator are one page if their years allow it; redirects count for the page they lead to. Every method runs as
`kellm link` in a process of its own; `cpu_s` and `wall_s` are of its whole tree.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
from bench_place import append_rows, provenance

from kellm_features.usage import measure
from kellm_spark.linking import DOMAINS

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "data" / "link_methods.csv"
METHODS = ("names", "edit-similarity")
COLUMNS = (
    "dataset domain method items linked judged judged_linked right precision recall cpu_s wall_s peak_mib pages "
    "machine cores python pyspark commit date"
).split()


def main() -> None:
    """Run both methods and print them side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalogue", required=True)
    parser.add_argument("--wiki", required=True, help="folder that `kellm wiki --dump` wrote")
    parser.add_argument("--gold", required=True, type=Path)
    parser.add_argument("--domain", default="movies", choices=[name for name, kinds in DOMAINS.items() if kinds])
    parser.add_argument("--years", type=int, default=1)
    parser.add_argument("--dataset", help="name of the catalogue in the rows; default: its folder")
    parser.add_argument("--disagreements", type=Path, help="CSV of judged links that are not the gold's, to read")
    parser.add_argument("--commit", help="instead of asking git")
    options = parser.parse_args()
    told = provenance("pyspark", commit=options.commit)
    pages = pd.read_parquet(
        options.wiki, columns=["wiki_page_id", "wiki_title", "redirect_to", "evidence", "year", "is_disambiguation"]
    )
    gold = read_gold(options.gold, pages, DOMAINS[options.domain])
    rows, wrong = [], []
    for method in METHODS:
        links, cost = link(options, method)
        row = judge(links, gold, options.years)
        wrong.append(row.pop("disagreements").assign(method=method))
        row |= {"dataset": options.dataset or Path(options.catalogue).parent.name, "domain": options.domain}
        row |= {"method": method, "pages": len(pages), **cost, **told}
        rows.append(row)
        print(*(f"{name} {row[name]}" for name in COLUMNS[2:13]), sep=", ", flush=True)
    if options.disagreements:
        pd.concat(wrong).to_csv(options.disagreements, index=False)
    append_rows(OUT, COLUMNS, rows)


def link(options: argparse.Namespace, method: str) -> tuple[pd.DataFrame, dict[str, float]]:
    """Links with the items' titles and years, and what the command cost."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "links"
        command = [str(Path(sys.executable).with_name("kellm")), "link", "--catalogue", options.catalogue]
        command += ["--wiki", options.wiki, "--out", str(out), "--domain", options.domain, "--method", method]
        with measure() as usage:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        links = pd.read_parquet(out)
    cost = {"cpu_s": usage.cpu_seconds, "wall_s": usage.seconds, "peak_mib": usage.peak_mib}
    return links, {name: round(value, 1) for name, value in cost.items()}


def read_gold(path: Path, pages: pd.DataFrame, kinds: tuple[str, ...]) -> pd.DataFrame:
    """item_id, item_year, and the pages that may be meant: titles with their years, by item."""
    leads = pages.dropna(subset="redirect_to")
    target = dict(
        zip(leads["wiki_title"], leads["redirect_to"].str.split("#").str[0].str.replace("_", " "), strict=True)
    )
    known: dict[str, list[tuple[str, float]]] = {}
    for page in pages[pages["redirect_to"].isna() & ~pages["is_disambiguation"]].itertuples():
        if len(page.evidence) and page.evidence[0] in kinds:
            known.setdefault(bare(page.wiki_title), []).append((page.wiki_title, page.year))
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        for item_id, title, address in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            page = unquote(address.rpartition("/resource/")[2] or address.rpartition("/wiki/")[2]).replace("_", " ")
            year = re.search(r"\((\d{4})\)\s*$", title)
            found = known.get(bare(target.get(page, page)), [])
            rows.append((item_id, title, int(year[1]) if year else None, found))
    return pd.DataFrame(rows, columns=["item_id", "title", "item_year", "pages"])


def judge(links: pd.DataFrame, gold: pd.DataFrame, years: int) -> dict[str, object]:
    """Counts, precision and recall over the items whose gold is believed; and the links that are not the gold's."""
    both = links.assign(item_id=links["item_id"].astype(str)).merge(gold, on="item_id")

    def near(row: pd.Series) -> list[str]:
        year = row["item_year"]
        return [title for title, of in row["pages"] if pd.isna(of) or pd.isna(year) or abs(of - year) <= years]

    both["gold"] = [near(row) for _, row in both.iterrows()]
    judged = both[both["gold"].map(bool)]
    told = judged[judged["wiki_page_id"].notna()]
    # The title has to be among those near in years: another film of the name is another page.
    hits = [title in titles for title, titles in zip(told["wiki_title"], told["gold"], strict=True)]
    right = told[pd.Series(hits, index=told.index, dtype=bool)]
    wrong = told.drop(right.index)
    return {
        "items": links["item_id"].nunique(),
        "linked": int(links["wiki_page_id"].notna().sum()),
        "judged": len(judged),
        "judged_linked": len(told),
        "right": len(right),
        "precision": round(len(right) / len(told), 4) if len(told) else None,
        "recall": round(len(right) / len(judged), 4) if len(judged) else None,
        "disagreements": wrong[["item_id", "title", "wiki_title", "gold"]],
    }


def bare(title: str) -> str:
    """Without disambiguator and percent signs: some dumps carry titles as addresses."""
    return re.sub(r" \([^()]*\)$", "", unquote(title)).casefold()


if __name__ == "__main__":
    main()
