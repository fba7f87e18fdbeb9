"""The committed sample Wikipedia is what its source builds, and has the layout of a real multistream dump."""

import bz2
import hashlib
import subprocess
import sys
from pathlib import Path

from lxml import etree

WIKI = Path(__file__).resolve().parent.parent / "examples" / "mini_wiki"
DUMP = WIKI / "dump" / "miniwiki-pages-articles-multistream.xml.bz2"
INDEX = WIKI / "dump" / "miniwiki-pages-articles-multistream-index.txt.bz2"
NS = "{http://www.mediawiki.org/xml/export-0.11/}"


def test_rebuilding_gives_the_committed_bytes() -> None:
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (DUMP, INDEX)}
    subprocess.run([sys.executable, str(WIKI / "build_dump.py")], check=True, capture_output=True)
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (DUMP, INDEX)} == before


def test_index_leads_to_the_streams() -> None:
    raw = DUMP.read_bytes()
    lines = [line.split(":", 2) for line in bz2.decompress(INDEX.read_bytes()).decode().splitlines()]
    offsets = sorted({int(offset) for offset, _, _ in lines})
    assert len(offsets) > 10
    for offset in offsets:
        stream = bz2.BZ2Decompressor().decompress(raw[offset:])
        pages = etree.fromstring(b"<pages>" + stream + b"</pages>")
        told = [(int(key), title) for start, key, title in lines if int(start) == offset]
        assert [(int(page.findtext("id")), page.findtext("title")) for page in pages] == told


def test_it_holds_what_linking_has_to_cope_with() -> None:
    root = etree.fromstring(bz2.decompress(DUMP.read_bytes()))
    pages = root.findall(f"{NS}page")
    titles = {page.findtext(f"{NS}title") for page in pages}
    texts = [page.findtext(f"{NS}revision/{NS}text") or "" for page in pages]
    assert sum("{{Infobox film" in text for text in texts) >= 150
    assert len(root.findall(f"{NS}page/{NS}redirect")) >= 20
    assert sum("{{disambiguation" in text.lower() for text in texts) >= 5
    assert {"Psycho (1960 film)", "Psycho (1998 film)", "Fargo, North Dakota"} <= titles
