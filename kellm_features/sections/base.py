"""What all sections of the settings tree are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Tuning = Field(json_schema_extra={"tuning": True})
"""Marks a setting of how a stage computes, and not of what: it changes speed or memory, and is left out of the config
hash. Rows stay the same but for what is trained: `device` and `compile` round otherwise, `ranks` draw as another seed
would."""

PositiveInt = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")
