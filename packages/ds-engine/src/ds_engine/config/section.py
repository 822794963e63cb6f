"""The base of every section, and the number types that JSON needs."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """Frozen and strict: no unknown key, no silent conversion of a string or a bool to a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _whole_number(value: Any) -> Any:
    """People write 5e8 for a count, which JSON reads as a float."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


Count = Annotated[int, BeforeValidator(_whole_number), Field(ge=0)]
"""A number of things, 0 or more; 5e8 is accepted for 500000000."""
Positive = Annotated[int, BeforeValidator(_whole_number), Field(ge=1)]
"""A number of things, 1 or more."""
