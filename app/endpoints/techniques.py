"""What can be done: techniques and recipes."""

from __future__ import annotations

from typing import Any, Union

from fastapi import APIRouter
from pydantic import TypeAdapter

from app.auth import Account
from app.contract.catalogue import TECHNIQUES, Technique
from app.contract.recipes import RECIPES, Recipe
from app.openapi import problems
from app.schemas import TechniqueView

router = APIRouter(prefix="/v1", tags=["techniques"])


def _view(technique: Technique) -> TechniqueView:
    return TechniqueView(
        name=technique.name,
        family=technique.family,
        title=technique.title,
        needs=technique.needs,
        applies_to=technique.applies_to,
        devices=technique.devices,
        may_not_follow=tuple(sorted(technique.may_not_follow)),
        exports=technique.exports,
        requires_export=technique.requires_export,
        step_schema=_schema(technique),
    )


def _schema(technique: Technique) -> dict[str, Any]:
    """Of its step, or of any of its steps."""
    if len(technique.specs) == 1:
        return technique.specs[0].model_json_schema()
    either: Any = Union[technique.specs]  # noqa: UP007 - of a tuple
    return TypeAdapter(either).json_schema()


VIEWS = [_view(technique) for technique in TECHNIQUES]


@router.get("/techniques", responses=problems(401, 503))
async def list_techniques(account: Account) -> list[TechniqueView]:
    """Every technique, with the JSON Schema of its step, what it needs, and on which models it works."""
    return VIEWS


@router.get("/recipes", responses=problems(401, 503))
async def list_recipes(account: Account) -> list[Recipe]:
    """Named lists of steps, for the field `recipe` of a job."""
    return list(RECIPES)
