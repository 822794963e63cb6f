"""The base of every section, and the kinds of values that JSON needs."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """Frozen and strict: no unknown key, no silent conversion of a string or a bool to a number."""

    # Keys such as `model_info` and `model_type` are DeepSpeed's, so pydantic's own prefix gives way.
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        protected_namespaces=(),
        arbitrary_types_allowed=True,
    )


def _whole_number(value: Any) -> Any:
    """People write 5e8 for a count, which JSON reads as a float."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("it has to be a whole number below 2^63")
    return value


def lowered(value: Any) -> Any:
    """For choices that are written in any case: "Warn", "WARN"."""
    return value.lower() if isinstance(value, str) else value


def listed(value: Any) -> Any:
    """One name where a list of names may stand."""
    return [value] if isinstance(value, str) else value


def _flag(value: Any) -> Any:
    return bool(value) if type(value) is int and value in (0, 1) else value


Flag = Annotated[bool, BeforeValidator(_flag)]
"""true or false, or 1 or 0 for a key that DeepSpeed reads without looking at its type."""
Whole = Annotated[int, BeforeValidator(_whole_number)]
"""A whole number of either sign."""
Count = Annotated[int, BeforeValidator(_whole_number), Field(ge=0)]
"""A number of things, 0 or more; 5e8 is accepted for 500000000."""
Positive = Annotated[int, BeforeValidator(_whole_number), Field(ge=1)]
"""A number of things, 1 or more."""
Number = Annotated[float, Field(allow_inf_nan=False)]
"""Any finite number."""
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A finite number, 0 or more."""
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
"""A part of a whole, 0 to 1."""
Names = Annotated[list[str], BeforeValidator(listed)]
"""A list of names; one name alone is taken for a list of one."""
