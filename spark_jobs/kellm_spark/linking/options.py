"""What may be chosen about linking, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from kellm_features.errors import ConfigError

Method = Literal["names", "edit-similarity"]

DOMAINS: dict[str, tuple[str, ...]] = {
    "movies": ("film", "television"),
    "television": ("television", "film"),
    "books": ("book",),
    "music": ("song", "album", "band"),
    "games": ("game",),
    "articles": (),
}
"""Kinds of page that the items of a domain may link to, the natural one first; articles mention pages of any kind."""


@dataclass(frozen=True)
class LinkOptions:
    """How items find their pages.

    Raises:
        ConfigError: an unknown domain or method, or a number out of range.
    """

    domain: str = "movies"
    """A key of `DOMAINS`."""
    method: Method = "names"
    """`names`: on keys, years and evidence, or silent. `edit-similarity`: the nearest title, as KELLMRec has it."""
    year_tolerance: int = 1
    """Years by which item and page may differ."""
    min_similarity: float = 0.9
    """1 - Levenshtein/max(length) of two keys, for a misspelt name."""
    max_links: int = 5
    """Pages of one article at most."""

    def __post_init__(self) -> None:
        if self.domain not in DOMAINS:
            raise ConfigError(f"link.domain is {self.domain!r}; known: {', '.join(DOMAINS)}")
        if self.method not in get_args(Method):
            raise ConfigError(f"link.method is {self.method!r}; known: {', '.join(get_args(Method))}")
        if self.method == "edit-similarity" and not self.kinds:
            raise ConfigError(
                f"link.method is 'edit-similarity', which finds one page for one title; the items of "
                f"{self.domain} mention many: take names"
            )
        if self.year_tolerance < 0:
            raise ConfigError(f"link.year_tolerance is {self.year_tolerance}; accepted: 0 or more")
        if not 0 < self.min_similarity <= 1:
            raise ConfigError(f"link.min_similarity is {self.min_similarity}; accepted: above 0, up to 1")
        if self.max_links < 1:
            raise ConfigError(f"link.max_links is {self.max_links}; accepted: 1 or more")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of page that an item may be about."""
        return DOMAINS[self.domain]
