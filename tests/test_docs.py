"""What the documents list is what the code has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from app import errors as web_errors
from app.contract.augmentation import Augmentation
from app.contract.catalogue import TECHNIQUES
from app.contract.codebook import Codebook
from app.contract.compression import Compress
from app.contract.errors import problem_classes
from app.contract.factorizing import Factorize
from app.contract.fusing import PASSES, Fuse
from app.contract.optimizing import Optimizer, Precision
from app.contract.packed.models import WEIGHTS
from app.contract.packed.stored import DTYPES
from app.contract.pruning import Criterion, Prune, Scope
from app.contract.recipes import RECIPES
from app.contract.rewiring import Rewire, What
from app.contract.scheduling import Schedule
from app.contract.spec import Finetune, JobSpec
from app.contract.structured import GroupLasso, Importance, StructuredPrune
from app.contract.tasks import HIGHER_IS_BETTER, TASKS
from app.contract.training import Training
from app.contract.widths import ResizeWidth
from app.settings import Settings

ROOT = Path(__file__).parent.parent


def test_every_setting_is_documented_and_none_is_invented() -> None:
    listed = set(re.findall(r"`TERSOR_([A-Z_]+)`", (ROOT / "docs" / "operations.md").read_text()))
    assert listed == {name.upper() for name in Settings.model_fields}


def test_the_readme_lists_every_technique_and_recipe() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in [technique.name for technique in TECHNIQUES] + [recipe.name for recipe in RECIPES]:
        assert f"| `{name}` |" in readme


def test_the_readme_shows_what_the_demo_printed() -> None:
    shown = (ROOT / "README.md").read_text().split("<!-- demo:begin -->")[1].split("<!-- demo:end -->")[0]
    for name in ("lenet.safetensors", "model.onnx", "model.safetensors"):
        assert name in shown
    assert "Every recomputed figure equals the report's." in shown


def test_the_http_guide_lists_every_error_code() -> None:
    guide = (ROOT / "docs" / "http.md").read_text()
    assert web_errors.InvalidParameter.code in problem_classes()  # those of the web layer count
    internal = {"internal_error", "lease_lost"}  # never sent to a client for anything it did
    missing = [code for code in problem_classes() if code not in internal and f"`{code}`" not in guide]
    assert not missing


def test_the_page_of_training_lists_every_field_and_its_example_is_taken() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    assert not [name for name in Training.model_fields if f"`{name}`" not in page and f"`{name}: " not in page]
    choices = (*get_args(Optimizer), *get_args(Schedule), *get_args(Precision))
    assert not [choice for choice in choices if f"`{choice}`" not in page]
    example = page.split("<!-- example -->")[1].split("```json")[1].split("```")[0]
    step = Finetune.model_validate_json(example)
    unset = Training(epochs=step.training.epochs)
    told = step.training.model_fields_set - {"epochs"}
    same = {name for name in told if getattr(step.training, name) == getattr(unset, name)}
    assert same == {"checkpoint_steps"}  # an example that says nothing new shows nothing


def test_the_page_of_pruning_lists_every_field_and_its_example_is_taken() -> None:
    text = (ROOT / "docs" / "pruning.md").read_text()
    fields = {*Prune.model_fields, *Codebook.model_fields, *Compress.model_fields} - {"technique", "method"}
    assert not [name for name in fields if f"`{name}`" not in text]
    values = (*get_args(Criterion), *get_args(Scope), *get_args(Codebook.model_fields["start"].annotation))
    assert not [value for value in values if f"`{value}`" not in text]
    Prune.model_validate_json(text.split("<!-- example -->")[1].split("```json")[1].split("```")[0])


def test_the_page_of_structure_lists_every_field_and_its_examples_are_taken() -> None:
    text = (ROOT / "docs" / "structure.md").read_text()
    steps = (Factorize, StructuredPrune, GroupLasso, ResizeWidth, Rewire, Fuse)
    fields = {name for step in steps for name in step.model_fields} - {"technique", "granularity"}
    assert not [name for name in fields if f"`{name}`" not in text]
    values = (
        *get_args(Importance),
        *get_args(StructuredPrune.model_fields["scope"].annotation),
        *PASSES,
        *get_args(What),
    )
    values += get_args(ResizeWidth.model_fields["search"].annotation)
    assert not [value for value in values if f"`{value}`" not in text]
    examples = [part.split("```json")[1].split("```")[0] for part in text.split("<!-- example -->")[1:]]
    taken = [JobSpec.model_validate({"model": f"mdl_{0:026}", "steps": [json.loads(one)]}).steps for one in examples]
    assert [step.technique for (step,) in taken] == ["factorize", "prune", "resize", "resize", "resize", "fuse"]  # type: ignore[union-attr, misc]


def test_the_page_of_the_packed_format_has_its_dtypes_and_weights() -> None:
    text = (ROOT / "docs" / "packed.md").read_text().replace("\n", " ")
    assert ", ".join(DTYPES) in text
    assert ", ".join(str(weight) for weight in WEIGHTS[:8]) in text


@pytest.mark.parametrize("page", ["augmentation", "processes"])
def test_examples_of_pages_are_taken(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    for example in text.split("<!-- example -->")[1:]:
        Finetune.model_validate_json(example.split("```json")[1].split("```")[0])


def test_the_page_of_augmentation_lists_every_field() -> None:
    text = (ROOT / "docs" / "augmentation.md").read_text()
    for name, field in Augmentation.model_fields.items():
        (row,) = re.findall(rf"^\| `{name}` .*$", text, re.MULTILINE)
        assert not [one for one in get_args(field.annotation)[0].model_fields if f"`{one}`" not in row]


def test_the_page_of_metrics_lists_every_metric_and_every_task() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert not [name for name in (*HIGHER_IS_BETTER, *TASKS) if f"`{name}`" not in page]
    directions = re.findall(r"^\| (.+?) \| (higher|lower) \|", page, re.MULTILINE)
    told = {name: way == "higher" for names, way in directions for name in re.findall(r"`(\w+)`", names)}
    assert told == HIGHER_IS_BETTER


def test_links_between_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
