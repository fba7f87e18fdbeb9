"""The stripper against hand-made cases, a real parser, and hostile input."""

from __future__ import annotations

import gc
import re
import time

import mwparserfromhell
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kellm_spark.wikitext import Names, first_year, infobox, parse_article, plain_text

CASES = {
    "''Alien'' is a '''1979''' film.": "Alien is a 1979 film.",
    "'''''Both''''' and ''''Quoted''' L''''Avventura''": "Both and 'Quoted L'Avventura",
    "By [[Ridley Scott]], a [[Film director|director]].": "By Ridley Scott, a director.",
    "In [[Paris, Texas|]] and [[Alien (film)|]].": "In Paris and Alien.",
    "Text<ref>Smith, ''Book'', p. 1</ref>, more<ref name=a/>.": "Text, more.",
    "A<ref name=x>{{cite web|url=http://a.b/}}</ref> b<!-- hidden\n{{ --> c": "A b c",
    "One {{citation needed|date={{#time:Y}}}} two.": "One two.",
    "It cost {{convert|5|km|mi}} of {{lang|fr|pellicule}}{{snd}}really.": "It cost 5 km of pellicule – really.",
    "The film ({{IPA|x}}; {{lang-fr|Les 400 Coups}}) won.": "The film (Les 400 Coups) won.",
    "Nothing ({{IPA|x}}) left.": "Nothing left.",
    "{| class=wikitable\n|-\n| a || [[b]]\n{| \n| nested\n|}\n|}\nAfter.": "After.",
    "[[File:A.jpg|thumb|A [[cat]] and ''dog'']]Text.": "Text.",
    "[[Image:B.png]]X [[Category:1979 films]]Y": "X Y",
    "[[:Category:Films]] and [[fr:Alien]]end": "Category:Films and end",
    "See [http://example.org/a?b=1 the site] and [https://x.y].": "See the site and.",
    "&lt;b&gt; &amp; caf&eacute;&nbsp;bar &ndash; 3 &minus; 1": "<b> & café bar – 3 − 1",
    "<nowiki>[[not a link]] {{nor this}} &amp;</nowiki>!": "[[not a link]] {{nor this}} &!",
    "a<br/>b <small>c</small> <span style='x'>d</span>": "a\nb c d",
    "* one\n* ''two''\n:: three\n----\nfour": "one\ntwo\nthree\n\nfour",
    "__NOTOC__Text with __FORCETOC__ words": "Text with words",
    "<math>\\frac{a}{b}</math>So <gallery>\nA.jpg|x\n</gallery>it is.": "So it is.",
    "unclosed {{template stays": "unclosed {{template stays",
    "stray }} and ]] and [[ half": "stray }} and and half",
    "== Plot ==\nHe dies.": "Plot\nHe dies.",
    "x < y and 1 <2": "x < y and 1 <2",
}


@pytest.mark.parametrize("source", CASES)
def test_hand_made_cases(source: str) -> None:
    assert plain_text(source) == CASES[source]


PAGE = """{{short description|1979 film}}
{{Infobox film
| name = Alien
| director = [[Ridley Scott]]
| starring = {{Plainlist|
* [[Tom Skerritt]]
* Sigourney Weaver<ref>a | b</ref>
}}
| released = {{Film date|1979|05|25|ref1=<ref>[http://x y]</ref>}}
| runtime = 117 minutes
}}
'''''Alien''''' is a 1979 [[science fiction film]].<ref>1985</ref>

It was shot in 14 weeks.
== Plot ==
The crew wakes.
=== Third act ===
One survives.
==Cast==
* Sigourney Weaver as [[Ellen Ripley|Ripley]]
== References ==
{{reflist}}
A list.
{{DISPLAYTITLE:''Alien''}}
[[Category:1979 films]]
[[Category:Films directed by Ridley Scott| ]]
"""


def test_an_article_in_its_parts() -> None:
    article = parse_article(PAGE)
    assert article.lead == "Alien is a 1979 science fiction film.\n\nIt was shot in 14 weeks."
    assert article.sections == [
        ("Plot", "The crew wakes.\nThird act\nOne survives."),
        ("Cast", "Sigourney Weaver as Ripley"),
    ]
    assert article.categories == ["1979 films", "Films directed by Ridley Scott"]
    box = infobox(article)
    assert box is not None
    assert box.name == "infobox film"
    assert plain_text(box.fields["director"]) == "Ridley Scott"
    assert "Skerritt" in box.fields["starring"]
    assert first_year(box.fields["released"]) == 1979
    assert [t.name for t in article.templates] == ["short description", "infobox film", "reflist", "displaytitle"]


def test_namespaces_go_by_their_local_names() -> None:
    names = Names.of({0: "", 6: "Fails", 14: "Kategoreja", 12: "Paleigs"})
    source = "[[Fails:A.jpg|thumb|x]]Teksts [[Kategoreja:Kins]][[Paleigs:B]]"
    assert plain_text(source, names) == "Teksts Paleigs:B"
    assert parse_article(source, names).categories == ["Kins"]
    # English names work in every edition.
    assert parse_article("[[Category:Films]]", names).categories == ["Films"]


def test_agrees_with_a_full_parser_on_plain_markup() -> None:
    source = (
        "'''Casablanca''' is a [[1942 in film|1942]] film by [[Michael Curtiz]].{{refn|note}} It won three [[Academy "
        "Award]]s &mdash; ''Best Picture'', {{nobr}}Best Director and [http://a.b/ best screenplay].\n\nIt is "
        "[[cult film|loved]].<!-- by all -->"
    )
    peer = str(mwparserfromhell.parse(source).strip_code())
    assert re.sub(r"\s+", " ", plain_text(source)) == re.sub(r"\s+", " ", peer).strip()


@pytest.mark.parametrize(
    "piece",
    [
        "{{",
        "}}",
        "[[",
        "[[a|",
        "<ref>",
        "<!--",
        "\n{|",
        "[//a",
        "{{nowrap|",
        "''' ",
        "( , ",
        "=\n",
        "<a ",
        "&",
        "\n \t",
    ],
)
def test_hostile_input_takes_linear_time(piece: str) -> None:
    """Eight times the input may take no more than some eight times as long; a quadratic step would take 64."""
    parse_article(piece * 100)
    gc.disable()  # the collector walks whatever else the test run has made

    def seconds(size: int) -> float:
        source = piece * (size // len(piece))
        start = time.process_time()
        parse_article(source)
        return time.process_time() - start

    try:
        small, large = (min(seconds(size) for _ in range(3)) for size in (20_000, 160_000))
    finally:
        gc.enable()
    assert large < 24 * small + 0.05


def test_one_long_line_takes_linear_time() -> None:
    for source in (
        "== " + " " * 200_000 + "x",
        "[//" + "a" * 200_000,
        "[[a" + " " * 200_000 + "(|]]",
        "(" + "," * 200_000,
    ):
        start = time.process_time()
        parse_article(source)
        assert time.process_time() - start < 1


MARKUP = st.lists(
    st.sampled_from(["{{", "}}", "[[", "]]", "{|", "|}", "|", "=", "'''", "<ref>", "</ref>", "<!--", "-->", "\n", "a ",
                     "Category:", "&lt;", "<nowiki>", "</nowiki>", "http://x ", "*", "_"]),
    max_size=60,
).map("".join)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(MARKUP)
def test_any_input_gives_text_and_no_closed_markup(source: str) -> None:
    article = parse_article(source)
    for text in (article.lead, *(body for _, body in article.sections)):
        if "<nowiki>" not in source:
            assert not re.search(r"\[\[[^\[\]{}]*\]\]|<ref>[^<]*</ref>", text)
        assert not any(0xE000 <= ord(char) < 0xE100 for char in text)
