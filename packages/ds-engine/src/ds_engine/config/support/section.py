"""The base class of all sections, and the types of their values."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from ds_engine.config.support.sizes import parse_bytes


class Section(BaseModel):
    """Base class of all sections. Frozen and strict: unknown keys are errors, and strings or bools are not converted
    to numbers.
    """

    # DeepSpeed has keys such as `model_info`, so pydantic's protected prefix `model_` is turned off.
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        protected_namespaces=(),
        arbitrary_types_allowed=True,
    )


def _whole_number(value: Any) -> Any:
    """Accepts 5e8 for a count, which JSON reads as a float."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("it must be an integer below 2^63")
    return value


def _size(value: Any) -> Any:
    return parse_bytes(value) if isinstance(value, str) else _whole_number(value)


def lowered(value: Any) -> Any:
    """Lowers the case of choices: "Warn", "WARN"."""
    return value.lower() if isinstance(value, str) else value


def listed(value: Any) -> Any:
    """Converts a single name to a list."""
    return [value] if isinstance(value, str) else value


def _flag(value: Any) -> Any:
    return bool(value) if type(value) is int and value in (0, 1) else value


Flag = Annotated[bool, BeforeValidator(_flag)]
"""true or false; also 1 or 0, for keys whose type DeepSpeed does not check."""
Whole = Annotated[int, BeforeValidator(_whole_number)]
"""An integer of either sign."""
Count = Annotated[int, BeforeValidator(_whole_number), Field(ge=0)]
"""An integer of at least 0; 5e8 is accepted for 500000000."""
Positive = Annotated[int, BeforeValidator(_whole_number), Field(ge=1)]
"""An integer of at least 1."""
Size = Annotated[
    int,
    BeforeValidator(_size),
    Field(ge=0),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}]}),
]
"""A number of bytes: an integer, or a string with a unit, such as "40GB" (powers of 1000) or "40GiB" (of 1024)."""
Number = Annotated[float, Field(allow_inf_nan=False)]
"""Any finite number."""
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A finite number of at least 0."""
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
"""A fraction between 0 and 1."""
Names = Annotated[list[str], BeforeValidator(listed)]
"""A list of names; a single name is converted to a list."""
