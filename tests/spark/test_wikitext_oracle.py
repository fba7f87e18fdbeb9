"""The stripper beside mwparserfromhell, and on arbitrary input.

mwparserfromhell parses wikitext into a tree. Its `strip_code` keeps the text of table cells, references, file captions
and categories, which a reader of prose does not get: those nodes are taken out of its tree first, by its own classes.
What is left differs on purpose in one way: it drops every template, where ours reads out those that stand for text.
"""

from __future__ import annotations

import re

import mwparserfromhell
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kellm_spark.wikitext import parse_article, plain_text

INVISIBLE = ("file:", "category:", "fr:")


def oracle(source: str) -> list[str]:
    """The words that mwparserfromhell shows, in order."""
    code = mwparserfromhell.parse(source)
    hidden = [link for link in code.filter_wikilinks() if str(link.title).lower().startswith(INVISIBLE)]
    hidden += code.filter_tags(matches=lambda node: node.tag in ("table", "ref"))
    for node in hidden:
        if code.contains(node):  # one inside another went with it
            code.replace(node, " ")
    return words(str(code.strip_code()))


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


FILM = """{{Short description|1995 film}}
{{Infobox film
| name     = Heat
| director = [[Michael Mann]]
| starring = {{Plainlist|
* [[Al Pacino]]
* [[Robert De Niro]]
}}
| released = {{Film date|1995|12|15|ref1=<ref>{{cite web|url=http://a.b|title=Heat}}</ref>}}
}}
[[File:Heat.jpg|thumb|left|200px|A [[poster]] of the ''film'']]
'''''Heat''''' is a [[1995 in film|1995]] American [[crime film]]<ref name="afi">{{cite web|url=http://c.d}}</ref> by
[[Michael Mann]], <!-- who also produced it --> starring [[Al Pacino]] and [[Robert De Niro]].<ref name="afi" /> It
follows the conflict between an [[Los Angeles Police Department|LAPD]] detective&nbsp;&ndash; and a thief.

== Plot ==
Neil McCauley plans a [[heist]].{{citation needed|date={{#time:Y}}}} Vincent Hanna, a '''lieutenant''', investigates.
* The ''first'' plan
* The second plan, see [http://e.f the script]
=== Aftermath ===
; Hanna : lives
: McCauley does not.

== Box office ==
{| class="wikitable sortable" style="text-align:center"
|+ Gross
! Weekend !! Gross
|-
| 1 || style="color:red" | 8,445,656
{| class=inner
| nested [[cell]]
|}
|}
The film<ref group=n>A note with a [[link]]</ref> earned ''$187 million'' worldwide.

[[Category:1995 films]]
[[Category:Heist films| Heat]]
[[fr:Heat]]
"""
TOWN = """'''Rēzekne''' (<small>''Latgalian''</small> ''Rēzne'') is a [[List of cities|city]] in the valley of the
[[Rēzekne River|Rēzekne]]. It is built on seven [[hill]]s, {{convert|242|km|mi|disp=x}}east of [[Riga]]<!-- the
capital -->.<br />Its nickname is "''The Heart of [[Latgale]]''".

== History ==
A [[hill fort]] stood here<ref>Smith, ''[[Towns]]'', p. 5</ref> from the 9th to the 13th century.<ref>[http://x.y
Z]</ref> In <nowiki>1285</nowiki> the [[Livonian Order]] built a <span style="color:red">stone</span> castle&mdash;now
a ruin.

== Gallery ==
<gallery>
File:A.jpg|A view
File:B.jpg|Another [[view]]
</gallery>
"""


@pytest.mark.parametrize(
    "source", [FILM, TOWN.replace("{{convert|242|km|mi|disp=x}}", "242 km ")], ids=["film", "town"]
)
def test_a_page_reads_as_the_oracle_reads_it(source: str) -> None:
    assert words(plain_text(source)) == oracle(source)


@pytest.mark.parametrize(
    ("source", "ours", "theirs"),
    [
        # Templates that stand for text.
        ("a {{lang|fr|b}} c", "a b c", "a c"),
        ("{{convert|5|km|mi}} on", "5 km on", "on"),
        # The reader of [[a|b|c]] sees the last part.
        ("[[a|b|c]]", "c", "b c"),
        # A comment or table that never ends reaches to the end of the page.
        ("a <!-- b", "a", "a b"),
        ("a\n{| class=x\n| b\nc", "a c", "a class x b c"),
        # Markup that crosses markup: what a reader sees, without what nothing closes.
        ("'''a ''b''' c''", "a b c", "a b c"),
        ("<ref>a <ref>b</ref> c", "c", "ref a c"),
        # A bare address shows as a number.
        ("see [http://a.b] there", "see there", "see there"),
    ],
)
def test_where_the_two_differ(source: str, ours: str, theirs: str) -> None:
    """The deviations by name, so that a new one shows up as a failure elsewhere."""
    assert " ".join(words(plain_text(source))) == ours
    assert " ".join(oracle(source)) == theirs


WORD = st.integers(0, 9999).map("w{}".format)
# No reference in a reference: for MediaWiki and for us the first end closes both, for the oracle the last one does.
CITED = st.one_of(*(WORD.map(form.format) for form in ("{}", "[[a|{}]]", "''{}''", "{{{{cite|t={}}}}}", "[//a.b {}]")))


def _inline(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Markup around text; `inner` may hold markup of its own."""
    return st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(" ".join),
        WORD.map("''{}''".format),
        WORD.map("'''{}'''".format),
        WORD.map("[[{}]]".format),
        st.tuples(WORD, WORD).map(lambda pair: f"[[{pair[0]}|{pair[1]}]]"),
        WORD.map("[http://a.b/c?d=e {}]".format),
        WORD.map("<!-- {} -->".format),
        WORD.map("<nowiki>{}</nowiki>".format),
        WORD.map("<small>{}</small>".format),
        CITED.map("<ref>{}</ref>".format),
        CITED.map("<ref name=x>{}</ref>".format),
        inner.map("{{{{dropped|{}}}}}".format),
        inner.map("{{{{dropped|a={}}}}}".format),
        inner.map("[[File:A.jpg|thumb|{}]]".format),
        st.sampled_from(["<ref name=x />", "&nbsp;", "&mdash;", "(a)", "1,5", "x.", "<br />", "{{dropped}}"]),
    ).map(" {} ".format)


INLINE = st.recursive(WORD, _inline, max_leaves=6)
TABLE = st.recursive(
    INLINE,
    lambda inner: st.lists(inner, min_size=1, max_size=3).map(
        lambda cells: "\n{| class=a\n|-\n! b\n" + "".join(f"| {cell}\n" for cell in cells) + "|}\n"
    ),
    max_leaves=3,
)
BLOCK = st.one_of(
    INLINE,
    TABLE,
    st.tuples(st.integers(2, 4), WORD).map(lambda pair: f"{'=' * pair[0]} {pair[1]} {'=' * pair[0]}"),
    st.lists(INLINE, min_size=1, max_size=3).map(lambda items: "\n".join(f"* {item.strip()}" for item in items)),
    WORD.map("[[Category:{}]]".format),
    WORD.map("[[fr:{}]]".format),
    INLINE.map("{{{{Box\n| a = {}\n| b = c\n}}}}".format),
    WORD.map("<math>\\frac{{{}}}{{2}}</math>".format),
)
PAGES = st.lists(BLOCK, max_size=6).map("\n\n".join)


@settings(max_examples=300, deadline=None)
@given(PAGES)
def test_any_page_of_a_grammar_reads_as_the_oracle_reads_it(source: str) -> None:
    """No word that the oracle drops, none lost that it keeps, and in its order."""
    assert words(plain_text(source)) == oracle(source)


@settings(max_examples=100, deadline=None)
@given(PAGES)
def test_plain_text_stays_plain(source: str) -> None:
    text = plain_text(source)
    assert plain_text(text) == text


@settings(max_examples=100, deadline=None)
@given(PAGES)
def test_the_parts_of_a_page_hold_what_the_page_holds(source: str) -> None:
    """Lead and sections are the page in order; without sections, lead, categories and template names stay the same."""
    whole, lead = parse_article(source), parse_article(source, sections=False)
    assert (lead.lead, lead.categories) == (whole.lead, whole.categories)
    assert {template.name for template in whole.templates} <= {template.name for template in lead.templates}
    said = words(" ".join([whole.lead, *(f"{name} {text}" for name, text in whole.sections)]))
    remaining = iter(words(plain_text(source)))
    assert all(word in remaining for word in said)  # a subsequence: what is missing are sections that say nothing


_FRAGMENTS = (
    "{{ }} [[ ]] [ ] {| |} |- | ! = == '' ''' <ref> </ref> <ref name= /> <!-- --> b Category: File: fr: &lt; &#xE0FE; "
    "& ; <nowiki> </nowiki> <pre> </pre> http://x __TOC__ __ ( ) , -{ }- : <br> <table> </table> lang|fr| convert|5| "
    "\ue000 \ue0fe Infobox é"
).split()
PIECES = st.lists(
    st.sampled_from([*_FRAGMENTS, " ", "\n", "\n* ", "\n==", "\n{|", "\t", "\u00a0", "a "]), max_size=60
).map("".join)


@settings(max_examples=500, deadline=None)
@given(PIECES)
def test_any_input_gives_text(source: str) -> None:
    """No error, the same each time, no longer than its source, no mark of ours, no markup that was closed."""
    article = parse_article(source)
    assert parse_article(source) == article
    texts = [article.lead, *(body for _, body in article.sections), *(name for name, _ in article.sections)]
    assert len(plain_text(source)) <= len(source)
    assert sum(map(len, texts)) <= len(source)
    for text in [*texts, plain_text(source), *article.categories]:
        assert not any(0xE000 <= ord(char) < 0xE100 for char in text)
        if "<nowiki>" not in source and "<pre>" not in source:
            assert not re.search(r"\[\[[^\[\]{}]*\]\]|<ref>[^<]*</ref>", text)
    for template in article.templates:
        assert not any(0xE000 <= ord(char) < 0xE100 for value in template.fields.values() for char in value)


PLAIN = st.text(
    st.characters(codec="utf-8", exclude_characters="[]{}|'<>=*:;#_~-&!", exclude_categories=["Co", "Cc"])
)  # markup, what only starts a list, private use and control characters


@settings(max_examples=300, deadline=None)
@given(st.lists(PLAIN, max_size=5).map("\n".join))
def test_text_without_markup_stays_as_it_is(source: str) -> None:
    assert plain_text(source).split() == source.split()
    article = parse_article(source)
    assert (article.lead.split(), article.sections, article.templates) == (source.split(), [], [])
