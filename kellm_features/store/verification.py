"""What verifying a version found: gates that passed, failed or were skipped. Kept as JSON in the catalog."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict

from kellm_features.settings import VerifySettings


class Gate(BaseModel):
    """One number of one view, held against its limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    view: str
    passed: bool
    """True also where it was skipped."""
    skipped: bool = False
    measured: float | None = None
    """None where it was skipped."""
    minimum: float | None = None
    maximum: float | None = None
    detail: str
    """One line: what was counted, or why it was skipped."""
    ids: tuple[str, ...] = ()
    """Where it failed, up to ten of the ids that it is about."""

    @property
    def limit(self) -> str:
        """What is accepted, e.g. `≥ 0.95`; empty where nothing was measured."""
        if self.minimum is not None and self.maximum is not None:
            return f"{_exact(self.minimum)} … {_exact(self.maximum)}"
        if self.minimum is not None:
            return f"≥ {_exact(self.minimum)}"
        return "" if self.maximum is None else f"≤ {_exact(self.maximum)}"

    @property
    def value(self) -> str:
        """What was measured, `-` where nothing was; rounded, and never onto or past a limit."""
        if self.measured is None:
            return "-"
        if self.measured.is_integer() and abs(self.measured) < 1e15:
            return f"{self.measured:,.0f}"
        limits = [limit for limit in (self.minimum, self.maximum) if limit is not None]
        texts = (f"{self.measured:.{digits}g}" for digits in range(4, 18))  # 17 digits tell any two float64 apart
        sides = [_side(self.measured, limit) for limit in limits]
        return next(text for text in texts if [_side(float(text), limit) for limit in limits] == sides)


def _side(value: float, limit: float) -> int:
    return (value > limit) - (value < limit)


def _exact(limit: float) -> str:
    short = f"{limit:g}"
    return short if float(short) == limit else repr(limit)


class Verification(BaseModel):
    """What the gates found of one version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    against: str | None
    """The version that was active; None: there was none, and comparisons were skipped."""
    checked_at: datetime
    seed: int
    """Of all samples."""
    settings: VerifySettings
    """The limits that held then: findings under other limits say nothing of these."""
    gates: tuple[Gate, ...]

    @property
    def passed(self) -> bool:
        """Whether the version may be promoted."""
        return all(gate.passed for gate in self.gates)

    def failures(self) -> list[str]:
        """One line for each gate that failed, with the ids that it names."""
        return [
            f"{gate.view}: {gate.name} is {gate.value}, accepted {gate.limit}: {gate.detail}"
            + (f"; ids {', '.join(gate.ids)}" if gate.ids else "")
            for gate in self.gates
            if not gate.passed
        ]
