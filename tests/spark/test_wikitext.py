"""The stripper against hand-made cases and hostile input; a real parser stands beside it in test_wikitext_oracle."""

from __future__ import annotations

import gc
import time

import pytest

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
    # What stands around something dropped closes up; what an author wrote stays.
    "Asphalt (occasionally {{IPA|x}}) and Allah ({{lang|ar|الله}}, {{IPA|x}}) {{cn}}.": (
        "Asphalt (occasionally) and Allah (الله)."
    ),
    "Acids such as {{x}}, {{y}}, and <math>z</math>; so.": "Acids such as, and; so.",
    "A lynx ({{x}}; 1775; <ref>a</ref>) and ({{x}}&nbsp;cats) ran.": "A lynx (1775) and (cats) ran.",
    "f () and ( , ) and ( a ) stay , as written .": "f () and ( , ) and ( a ) stay , as written .",
    "One.<!-- a\nb -->\nTwo.": "One.\nTwo.",
    "One paragraph\n<!-- a remark -->\nof two lines.": "One paragraph\nof two lines.",
    "Text <!-- without an end\n== B ==": "Text",
    # Templates that stand for text, as a reader sees them.
    "{{nowrap|1=''E'' = mc}} is {{formatnum: 3003}} m.": "E = mc is 3003 m.",
    "{{convert|60|to|70|km|mi}}, {{convert|6|ft|4|in}}, {{cvt|33|m2|0}}": "60 to 70 km, 6 ft 4 in, 33 m2",
    "{{frac|3|1|2}}, {{frac|2}}, {{sfrac|1|4}}": "3 1/2, 1/2, 1/4",
    "{{USS|Hornet|CV-12|6}}, {{ship|HMS|Ajax|22}}": "USS Hornet, HMS Ajax",
    "{{US$|3 million}} {{c.|1900}} 3{{e|5}} {{chem|Ge|4|2-}}": "US$3 million c. 1900 3×105 Ge42-",
    "{{As of|2009}}, {{as of|2010|lc=y}}, {{as of|2011|alt=by 2011}}": "As of 2009, as of 2010, by 2011",
    "{{quote|text=To be.|source=Hamlet}}": "To be.",
    "{{hlist|[[a|b]]|c}}": "b, c",
    "{{val-en|Riga}} {{Vol-lv|Rīga}} {{IPA-de|x}} {{cite-en|y}}!": "Riga Rīga!",
    "{{lang|fr|<span lang='fr'>oui</span>|italic=no}}": "oui",
    # Files under a name that the dump does not tell; a caption with an external link.
    "[[Attēls:a.JPG|thumb|cap]]x [[Files:b.png|50px]]y [[:File:a.jpg]]": "x y File:a.jpg",
    "[[File:a.jpg|thumb|[http://x 25 N]]]Text [[a|b [c]]] d": "Text b [c] d",
    "[[simple:Alien]][[zh-min-nan:X]][[UFO: Aftermath]]": "UFO: Aftermath",
    # Tables: in HTML; without an end; with an end too many.
    "a<table class=x><tr><td>b<table><tr><td>c</table></table>d": "ad",
    "{| class=a\n|-\n! h\n| c\nProse stays.\n* so do lists": "Prose stays.\nso do lists",
    "{| a\n| b\n{| c\n|}\nText": "Text",
    "a\n|}\nb": "a\nb",
    "{{(!}} class=x\n{{!}} cell\n{{!)}}\nText": "Text",
    # Entities end with a semicolon; tags that break lines.
    "R&D, ?a=1&copy=2, &#65;&#x42;, &amp;lt;": "R&D, ?a=1&copy=2, AB, &lt;",
    "a<br>\nb</br>c<p>d</p>e<ul><li>f<li>g</ul>": "a\nb\nc\nd\ne\n\nf\ng",
    "__КРАТКО__a __init__ b": "a __init__ b",
    "-{zh-hans:计算机; zh-hant:電腦}--{H|zh:x}- {-{a}-}": "计算机 {a}",
    "<includeonly>never</includeonly>seen <noinclude>here</noinclude>": "seen here",
    "a\r\n* b\r\n": "a\nb",
    "a \ue000 b &#xE0FE; c": "a \ufffd b \ufffd c",
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


@pytest.mark.parametrize(
    "source",
    [
        PAGE,
        "no heading",
        PAGE.replace("== Plot ==", "{{quote|\n== no heading ==\n}}\n== Plot =="),
        PAGE.replace("== Plot ==", "<!--\n== no heading ==\n-->\n== Plot =="),
        PAGE.replace("== Plot ==", "<gallery>\n== no heading ==\n</gallery>\n== Plot =="),
        PAGE.replace("== Plot ==", "{|\n== no heading ==\n|}\n== Plot =="),
        "Lead.\n=== Deep ===\nLead.\n== Plot ==\n<!-- [[Category:Not]] {{not}} -->\n[[Category:Yes]]{{Yes|{{Inner}}}}",
    ],
)
def test_the_lead_alone(source: str) -> None:
    """`sections=False` is what a run over a whole dump asks for: the lead and what tells pages apart stay the same."""
    whole, lead = parse_article(source), parse_article(source, sections=False)
    assert lead.sections == []
    assert (lead.lead, lead.categories, lead.magic_words) == (whole.lead, whole.categories, whole.magic_words)
    names = [template.name for template in whole.templates]
    assert [t.name for t in lead.templates if t.name in names] == names
    assert {t.name for t in lead.templates} - set(names) <= {"inner"}  # below the lead, inner ones are named too
    told, kept = infobox(whole), infobox(lead)
    assert (told and told.fields) == (kept and kept.fields)


def test_sections_that_say_nothing_are_left_out_in_any_language() -> None:
    source = """Vads.
== Vēsture ==
=== Tukša ===
{| class=wikitable
| 1
|}
=== Pilna ===
==== Dziļa ====
Teksts.
=== Galerija ===
<gallery>
a.jpg
</gallery>
== Aktieri ==
* [[Anna Lizaran]]
* [[Mercè Pons]]
== Demogrāfija ==
=== Valoda ===
=== Reliģija ===
== Atsauces ==
<references />
* {{cite web|url=http://a.b}}
== Ārējās saites ==
* ''[http://a.b Vietne]'' (latviski)
* [//c.d Cita]
https://e.f/g
[[fr:Alien]]
== Saites ==
* [http://a.b Vietne]
* Grāmata, 1999
== Piezīme ==
[http://a.b Vietne] ir viss, kas palika.
== Siehe auch ==
* [[Blade Runner]]
"""
    assert parse_article(source).sections == [
        ("Vēsture", "Pilna\nDziļa\nTeksts."),
        ("Aktieri", "Anna Lizaran\nMercè Pons"),
        ("Saites", "Vietne\nGrāmata, 1999"),
        ("Piezīme", "Vietne ir viss, kas palika."),
    ]


def test_what_spans_headings_is_dropped_whole() -> None:
    """A comment, a template, a table and <nowiki> may hold lines that look like headings."""
    for opens, closes in (("<!--", "-->"), ("{{x|", "}}"), ("{|\n|", "\n|}"), ("<ref>", "</ref>")):
        article = parse_article(f"Lead.\n{opens}\n== No ==\nhidden\n{closes}\n== Yes ==\nseen\n")
        assert (article.lead, article.sections) == ("Lead.", [("Yes", "seen")])
    article = parse_article("Lead.\n<nowiki>\n== No ==\n</nowiki>\n== Yes ==\nseen\n")
    assert (article.lead, article.sections) == ("Lead.\n\n== No ==", [("Yes", "seen")])


def test_an_infobox_under_other_names() -> None:
    names = (
        "Infobox film|Film infobox|Infoskreine volūda|Infoboks film|Ficha de película|Info/Filme|Taxobox|Speciesbox|"
        "Automatic taxobox|Карточка|Film bilgi kutusu"
    )
    for name in names.split("|"):
        box = infobox(parse_article("{{Use dmy dates}}\n{{" + name + "\n| a = <nowiki>[[b]]</nowiki>\n}}Lead"))
        assert box is not None, name
        assert plain_text(box.fields["a"]) == "[[b]]"
    assert infobox(parse_article("{{Informal|a=b}}{{infoboxes}}{{Taxonomy}}")) is None


@pytest.mark.parametrize(
    "piece",
    [
        "{{",
        "}}",
        "[[",
        "[[[",
        "]]]",
        "[[a|",
        "[[[[a|",
        "[[[[a]] ",
        "<ref>",
        "<ref ",
        "<!--",
        "<nowiki>",
        "<nowiki/>",
        "\n{|",
        "\n|}",
        "\n{|\n|a\n",
        "<table>",
        "[//a",
        "[http://",
        "[http://a b",
        "{{nowrap|",
        "{{{{a|b",
        "{{x}}",
        "({{x}};",
        "{{x}} ",
        "{{x}}, ",
        "{{convert|",
        "{{lang|fr|[[a|b]]",
        "-{",
        "-{a;",
        "''' ",
        "'''",
        "( , ",
        "(((",
        "=\n",
        "\n==a==\n",
        "\n==== a ====\n",
        "<a ",
        "&",
        "&amp;",
        "__A",
        "__AAA__",
        "\n \t",
        "\n* http://a",
        "[[File:a.jpg|",
        "[[Category:a",
        "[[   ",
        "\ue0fe",
        "<br>\n",
    ],
)
def test_hostile_input_takes_linear_time(piece: str) -> None:
    """Eight times the input may take no more than some eight times as long; a quadratic step would take 64.

    Processor time of one process, the best of three, against three times what linear work needs.
    """
    parse_article(piece * 100)
    gc.disable()  # the collector walks whatever else the test run has made

    def seconds(size: int) -> float:
        source = piece * (size // len(piece))
        start = time.process_time()
        article = parse_article(source)
        [template.fields for template in article.templates[:1]]
        infobox(article)
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
        "({{x}}" + ", " * 100_000 + "(",
        "{{x}}" + ")" * 200_000,
        "\n" + ":" * 200_000 + "{|",
        "[[Category:" + "a" * 200_000 + "]]",
        "{{" + "Infobox " * 25_000 + "}}",
        "-{" + "a;" * 100_000,
        "&" + "a" * 200_000,
    ):
        start = time.process_time()
        parse_article(source)
        assert time.process_time() - start < 1
