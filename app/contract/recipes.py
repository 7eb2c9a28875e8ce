"""Named recipes: each is a list of steps and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from app.contract.compression import Compress
from app.contract.distillation import Distill
from app.contract.errors import InvalidSpec
from app.contract.pruning import Prune
from app.contract.spec import ExportFormat, Finetune, JobSpec, Quantize, ResolvedSpec, Step, trainings_of
from app.contract.strict import Strict
from app.contract.training import Training
from app.contract.widths import TakesUnits


class Recipe(Strict):
    """A preset."""

    name: str
    title: str
    description: str
    needs: tuple[str, ...] = Field(description="The splits that the dataset must have.")
    steps: tuple[Step, ...]
    export: tuple[ExportFormat, ...] | None = Field(None, description="Delivered where the job names no formats.")


RECIPES: tuple[Recipe, ...] = (
    Recipe(
        name="int8",
        title="Static int8",
        description="Static 8-bit quantization without training. Needs only calibration data.",
        needs=("calibration",),
        steps=(Quantize(method="static"),),
    ),
    Recipe(
        name="sparse",
        title="80 % sparse",
        description="Gradual magnitude pruning to 80 % sparsity with distillation from the uploaded model.",
        needs=("train",),
        steps=(
            Prune(
                sparsity=0.8,
                schedule="cubic",
                training=Training(epochs=5, lr=1e-3, schedule="cosine", distill=Distill()),
            ),
        ),
    ),
    Recipe(
        name="small",
        title="Sparse, distilled, int8",
        description="Gradual pruning to 80 % and fine-tuning, both distilled from the upload, then static int8.",
        needs=("train",),
        steps=(
            Prune(sparsity=0.8, schedule="cubic", training=Training(epochs=4, lr=1e-3, distill=Distill())),
            Finetune(training=Training(epochs=2, lr=1e-3, schedule="cosine", distill=Distill())),
            Quantize(method="static"),
        ),
    ),
    Recipe(
        name="threshold-int8",
        title="Threshold pruning, Adam, int8",
        description="A worked example of the literature: weights below 0.01 go, Adam at 0.001 for 10 epochs, 8 bits.",
        needs=("train",),
        steps=(
            Prune(threshold=0.01, training=Training(epochs=10, optimizer="adam", lr=1e-3)),
            Quantize(method="static"),
        ),
    ),
    Recipe(
        name="smallest",
        title="The smallest file",
        description="Gradual pruning with distillation from the upload, codebooks, entropy coding: as few bytes as "
        "hold the upload's metric on the validation split.",
        needs=("train", "validation"),
        steps=(Compress(),),
        export=("native", "packed"),
    ),
)

BY_NAME: dict[str, Recipe] = {recipe.name: recipe for recipe in RECIPES}


def resolve(spec: JobSpec) -> ResolvedSpec:
    """Unfolds the recipe and fills in every default.

    Raises InvalidSpec (pointer /recipe) for a name that is none of the recipes.
    """
    steps, export = spec.steps, spec.export
    if spec.recipe is not None:
        recipe = BY_NAME.get(spec.recipe)
        if recipe is None:
            raise InvalidSpec(
                f"There is no recipe {spec.recipe!r}. There are: {', '.join(BY_NAME)}.", pointer="/recipe"
            )
        steps = recipe.steps
        if recipe.export is not None and "export" not in spec.model_fields_set:
            export = recipe.export
    assert steps is not None
    steps = tuple(_settled(step, steps[place + 1 :]) for place, step in enumerate(steps))
    return ResolvedSpec(
        model=spec.model, dataset=spec.dataset, recipe=spec.recipe, steps=steps, export=export, seed=spec.seed
    )


def _settled(step: Step, later: Sequence[Step]) -> Step:
    """With what `auto` stands for where later steps say it."""
    trained = any(trainings_of(one) for one in later)
    if isinstance(step, TakesUnits) and step.reconstruct == "auto" and trained:
        return step.model_copy(update={"reconstruct": False})
    return step
