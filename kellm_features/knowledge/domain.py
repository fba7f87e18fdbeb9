"""What a kind of item is called, which factors describe it, and how its prompts read: one TOML file per domain."""

from __future__ import annotations

import re
import string
import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from kellm_features.errors import ConfigError

SHIPPED = ("articles", "books", "movies", "products")
ITEM_FIELDS = frozenset({"title", "year", "genres", "factors"})
USER_FIELDS = frozenset({"demographics", "history", "descriptions", "factors"})

_CAPITAL = "[A-ZÀ-ÖØ-Þ]"
_WORD = rf"(?:(?:{_CAPITAL}\.)+|(?:Jr|Sr|St|Dr)\.|{_CAPITAL}[\w'’-]+)"
NAME = rf"{_WORD}(?: (?:{_WORD}|d[aeiu]l?|v[ao]n|der|den|la|le|bin|al))*"
"""A proper name: capitalised words, initials and particles; a full stop only behind an initial or abbreviation."""
_PLACEHOLDERS = {
    "{name}": rf"(?P<value>{NAME}(?: and {NAME})?)",
    "{names}": rf"(?P<value>{NAME}(?:, {NAME})*(?:,? and {NAME})?)",
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Template = Annotated[str, Field(min_length=1)]
Factors = Annotated[tuple[Annotated[str, Field(min_length=2, max_length=60)], ...], Field(min_length=1)]
Tokens = Annotated[int, Field(ge=16, le=131072)]
AGAIN = "Name only persons, titles, years and numbers that stand in the text above."
BY_FACTOR = """Answer with one JSON object and nothing else. Its keys are exactly: {factors}. \
Each value is a short text; it is empty where nothing is known."""


class _Prompts(_Part):
    """What the prompts of both sides have: `system` comes first and is the same for every item, or user.

    `again` is added to a prompt whose first answer said what its source does not tell, `by_factor` where one text per
    factor is asked for.
    """

    factors: Factors
    system: Template
    again: Template = AGAIN
    by_factor: Template = BY_FACTOR

    def _check_common(self, side: str) -> None:
        # Only the factors may vary a system text, and they do not vary within a domain: every prompt shares it.
        _check_template(f"{side}.system", self.system, {"factors"}, {"factors"})
        _check_template(f"{side}.again", self.again, {"factors"}, set())
        _check_template(f"{side}.by_factor", self.by_factor, {"factors"}, {"factors"})
        if len(set(map(str.casefold, self.factors))) < len(self.factors):
            raise ValueError(f"{side}.factors names one factor twice: {', '.join(self.factors)}")


class ItemPrompts(_Prompts):
    """Templates of an item's prompt."""

    grounded: Template
    closed_book: Template

    @model_validator(mode="after")
    def _fields(self) -> ItemPrompts:
        self._check_common("item")
        _check_template("item.grounded", self.grounded, ITEM_FIELDS | {"page"}, {"title", "page"})
        _check_template("item.closed_book", self.closed_book, ITEM_FIELDS, {"title"})
        return self


class UserPrompts(_Prompts):
    """Templates of a user's prompt."""

    prompt: Template

    @model_validator(mode="after")
    def _fields(self) -> UserPrompts:
        self._check_common("user")
        _check_template("user.prompt", self.prompt, USER_FIELDS, {"history"})
        return self


class FactRule(_Part):
    """How one factor is read off a page, and said.

    `patterns` are regular expressions tried in order; `{name}` in them stands for one or two proper names, `{names}`
    for a list, and else a group `value` marks what is taken. `section`: names that open the lines of that section
    are added.
    """

    factor: str
    phrase: str
    patterns: tuple[str, ...] = ()
    section: str | None = None
    limit: Annotated[int, Field(gt=0)] = 1
    before_noun: bool = False

    @field_validator("phrase")
    @classmethod
    def _one_value(cls, phrase: str) -> str:
        _check_template("phrase", phrase, {"value"}, {"value"})
        return phrase

    @field_validator("patterns")
    @classmethod
    def _compiles(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                groups = re.compile(expand_pattern(pattern)).groupindex
            except re.error as error:
                raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
            if "value" not in groups:
                raise ValueError(f"pattern {pattern!r} holds none of {{name}}, {{names}} and (?P<value>…)")
        return patterns


class Budget(_Part):
    """Estimated tokens of the texts that a prompt quotes; a setting of the same name wins."""

    page_tokens: Tokens = 320
    profile_tokens: Tokens = 1024
    digest_tokens: Tokens = 60
    """Of the description of one item in a user's history."""


class Domain(_Part):
    """One kind of item: its words, prompts, factors, and the order in which page sections are taken."""

    name: str
    version: int
    noun: str
    plural: str
    consumer: str
    sections: tuple[str, ...] = ()
    budget: Budget = Budget()
    item: ItemPrompts
    user: UserPrompts
    facts: tuple[FactRule, ...] = ()

    def budgeted(self, **tokens: int | None) -> Domain:
        """The domain with other budgets, each None keeping the domain's own."""
        told = {name: value for name, value in tokens.items() if value is not None}
        return self.model_copy(update={"budget": self.budget.model_copy(update=told)})


def load_domain(name_or_path: str | Path) -> Domain:
    """A shipped domain by name, or one's own by the path of a TOML file.

    Raises:
        ConfigError: no such domain, unreadable TOML, a key or a template field that is unknown or missing.
    """
    path = domain_path(name_or_path)
    try:
        if path is not None:
            text = path.read_text(encoding="utf-8")
        elif name_or_path in SHIPPED:
            text = (resources.files(__package__) / "domains" / f"{name_or_path}.toml").read_text(encoding="utf-8")
        else:
            raise ConfigError(
                f"'generate.domain' is {str(name_or_path)!r}: accepted are {', '.join(SHIPPED)} "
                "or the path of a .toml file"
            )
        tree: dict[str, Any] = tomllib.loads(text)
    except FileNotFoundError as error:
        raise ConfigError(f"domain file {path} does not exist: correct generate.domain") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"domain file {path} is not readable TOML: {error}") from error
    try:
        return Domain.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "domain"
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"domain {name_or_path}: '{key}': {message[0].lower()}{message[1:]}") from error


def domain_path(name_or_path: str | Path) -> Path | None:
    """The file that `generate.domain` names, or None where it names a shipped domain."""
    path = Path(name_or_path)
    return path.expanduser() if path.suffix == ".toml" or len(path.parts) > 1 else None


def expand_pattern(pattern: str) -> str:
    """A fact pattern with its placeholders written out."""
    for placeholder, expression in _PLACEHOLDERS.items():
        pattern = pattern.replace(placeholder, expression)
    return pattern


def _check_template(where: str, template: str, known: set[str] | frozenset[str], needed: set[str]) -> None:
    accepted = ", ".join(f"{{{name}}}" for name in sorted(known))
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"the template {where} has an unpaired brace ({error}); fields are {accepted}") from error
    seen = {field for _, field, _, _ in parsed if field is not None}
    for _, field, spec, conversion in parsed:
        if field is not None and (field not in known or spec or conversion):
            raise ValueError(f"the template {where} has the unknown field {{{field}}}; accepted are {accepted}")
    if missing := sorted(needed - seen):
        raise ValueError(f"the template {where} lacks the field {{{missing[0]}}}; accepted are {accepted}")
