"""Wikitext to plain text, in linear time on any input.

Wikitext has no grammar: this reads what a reader of an article would see and drops the rest. Each step is one
pass: comments, references and other dropped tags (`tags`); templates (`templates`) and tables (`tables`), a stack
of open braces each; links (`links`), a stack of open brackets; then flat markup (`flat`). What is opened and never
closed is kept as text, except where MediaWiki itself closes it at the end of the page: comments and tables.
"""

from kellm_spark.wikitext.article import Article, first_year, infobox, parse_article, plain_text, texts
from kellm_spark.wikitext.links import Names
from kellm_spark.wikitext.templates import Template

__all__ = ["Article", "Names", "Template", "first_year", "infobox", "parse_article", "plain_text", "texts"]
