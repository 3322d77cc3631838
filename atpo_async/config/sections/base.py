"""What every section of a configuration is: a frozen pydantic model that refuses unknown keys."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """Frozen, without unknown keys; one per concern."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would read ``lr = true`` as 1; and ``dual_clip = "none"`` is none, in a file as in an option."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if value == "none" and type(None) in get_args(annotation):
            return None
        parts = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(part, bool) for part in parts) and not _takes(annotation, bool):
            raise PydanticCustomError("truth", "takes no truth value")
        return value


def _takes(annotation: Any, kind: type) -> bool:
    """Whether ``kind`` occurs in a field's annotation."""
    return annotation is kind or any(_takes(part, kind) for part in get_args(annotation))
