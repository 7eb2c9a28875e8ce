"""The spec that comes with a model or a dataset."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from app.contract.architecture import DatasetSpec, ModelSpec
from app.contract.records import UploadKind
from app.errors import InvalidFields
from app.pointers import violations

SPECS: dict[UploadKind, type[ModelSpec | DatasetSpec]] = {"model": ModelSpec, "dataset": DatasetSpec}


def checked_spec(kind: UploadKind, raw: Any) -> dict[str, Any]:
    """The spec as it is stored; raises InvalidFields, with pointers below /spec."""
    try:
        spec = SPECS[kind].model_validate(raw)
    except ValidationError as error:
        raise InvalidFields(violations(error, raw, "/spec")) from None
    return spec.model_dump(mode="json", exclude_unset=True)
