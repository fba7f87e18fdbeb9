"""What SWING computes: its formula's constants, its filters and its caps, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from kellm_features.errors import ConfigError

Side = Literal["item", "user"]
Mode = Literal["auto", "csr", "block"]


@dataclass(frozen=True)
class SwingParameters:
    """s(i,j) = Σ_{u<v} w_u·w_v / (alpha + |I_u ∩ I_v|), w_u = (alpha1 + |I_u|)^(-beta)."""

    alpha: float
    alpha1: float
    beta: float


PRESETS: dict[str, SwingParameters] = {
    # The paper's equations, repaired: as printed, the similarity falls with the overlap.
    "kellmrec": SwingParameters(alpha=1, alpha1=0, beta=0),
    # Yang et al. 2020 (arXiv 2010.05525); their double sum counts both orders of a pair, twice this.
    "yang": SwingParameters(alpha=1, alpha1=0, beta=0.5),
    # Flink ML, `Swing`.
    "flink": SwingParameters(alpha=0, alpha1=15, beta=0.3),
    # Alink and PAI as published: the sign makes heavy users count for more. For parity only.
    "alink": SwingParameters(alpha=1, alpha1=5, beta=-0.35),
    # PAI-Rec's production default.
    "pai-rec": SwingParameters(alpha=1, alpha1=5, beta=0.3),
}

RANGES = {"alpha": (0.0, 1e9), "alpha1": (0.0, 1e9), "beta": (-10.0, 10.0)}
"""Within them no score of a billion interactions overflows or vanishes."""
MAX_EXACT_WITNESSES = 11_585
"""The float64 matrix of one target's witness pairs is then 1 GiB, all of it in one task."""


@dataclass(frozen=True)
class SwingOptions:
    """One side's job. `None` for a cap or a maximum means none.

    Raises:
        ConfigError: a value is out of range.
    """

    side: Side
    parameters: SwingParameters
    top_k: int = 100
    max_witnesses: int | None = None
    min_user_items: int = 1
    max_user_items: int | None = None
    max_item_users: int | None = None
    mode: Mode = "auto"

    def __post_init__(self) -> None:
        for name, kinds in (("side", Side), ("mode", Mode)):
            value = getattr(self, name)
            if value not in get_args(kinds):
                raise ConfigError(f"swing {name} is {value!r}; accepted: {', '.join(map(repr, get_args(kinds)))}")
        for name, least in (
            ("top_k", 1),
            ("max_witnesses", 2),
            ("min_user_items", 1),
            ("max_user_items", self.min_user_items),
            ("max_item_users", 2),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                told = f"{least} (the minimum)" if name == "max_user_items" else str(least)
                raise ConfigError(f"swing {name} is {value}; accepted: {told} or more")

    @property
    def witness(self) -> str:
        """Column of those whose pairs are counted: users where items are paired, items where users are."""
        return "user_id" if self.side == "item" else "item_id"

    @property
    def target(self) -> str:
        """Column of those that are paired."""
        return "item_id" if self.side == "item" else "user_id"


def swing_parameters(
    preset: str = "pai-rec",
    alpha: float | None = None,
    alpha1: float | None = None,
    beta: float | None = None,
) -> SwingParameters:
    """A preset with single values overridden.

    Raises:
        ConfigError: no such preset, or a value outside `RANGES`.
    """
    if preset not in PRESETS:
        raise ConfigError(f"swing preset is {preset!r}; known: {', '.join(PRESETS)}")
    base = PRESETS[preset]
    chosen = SwingParameters(
        alpha=base.alpha if alpha is None else alpha,
        alpha1=base.alpha1 if alpha1 is None else alpha1,
        beta=base.beta if beta is None else beta,
    )
    for name, (least, most) in RANGES.items():
        value = getattr(chosen, name)
        if not least <= value <= most:  # nor NaN
            raise ConfigError(f"swing {name} is {value}; accepted: {least:g} to {most:g}")
    return chosen
