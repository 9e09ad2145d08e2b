"""What every part of a configuration file has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the file. Unknown keys are refused, values are frozen once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
