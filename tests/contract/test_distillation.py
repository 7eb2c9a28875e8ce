"""What the specification of a distillation takes and refuses, and which models a job names by it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from app.contract.catalogue import check_order
from app.contract.compatibility import check, check_named
from app.contract.distillation import AutoStudent, Distill
from app.contract.errors import DatasetMismatch, ModelsMismatch, OrderRefused, TersorError, Unsupported
from app.contract.facts import TensorFacts
from app.contract.recipes import resolve
from app.contract.spec import DistillStep, JobSpec, ResolvedSpec
from tests.contract.facts import dataset_facts, model_facts

OWN, FIRST, SECOND = ("mdl_" + digit * 26 for digit in "012")
STUDENT = {"kind": "model", "model": FIRST}


def resolved(*steps: dict[str, Any], **fields: Any) -> ResolvedSpec:
    return resolve(JobSpec.model_validate({"model": OWN, "steps": steps} | fields))


def distil(student: dict[str, Any] | None = None, **distill: Any) -> dict[str, Any]:
    return {"technique": "distill", "student": student, "training": {"distill": distill}}


def test_a_step_without_a_word_distils_the_model_as_it_stands() -> None:
    step = DistillStep.model_validate({"technique": "distill", "training": {"epochs": 3}})
    assert step.student is None
    assert step.training.epochs == 3
    assert step.training.distill == Distill()
    assert step.training.distill.teachers == ("uploaded",)
    assert [loss.kind for loss in step.training.distill.losses] == ["soft_targets"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, (0.25, None)), ({"parameters": 0.1}, (0.1, None)), ({"macs": 0.5}, (None, 0.5))],
)
def test_a_budget_is_a_quarter_of_the_parameters_unless_given(given: dict[str, Any], expected: tuple[Any, Any]) -> None:
    student = AutoStudent.model_validate({"kind": "auto"} | given)
    assert (student.parameters, student.macs) == expected


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (distil({"kind": "auto", "parameters": 0.5, "macs": 0.5}), "one budget: parameters, macs"),
        (distil({"kind": "auto", "parameters": 1}), "less than 1"),
        (distil({"kind": "architecture"}), "exactly one of architecture and config"),
        (distil({"kind": "architecture", "config": {}, "architecture": {"layers": []}}), "at least 1"),
        (distil({"kind": "model", "model": "lenet"}), "match pattern"),
        (distil(STUDENT, teacher=["uploaded", FIRST]), "one of its teachers"),
        (distil(teacher=["uploaded", "uploaded"]), "names a model twice"),
        (distil(teacher=[]), "at least 1"),
        (distil(losses=[]), "at least 1"),
        (distil(losses=[{"kind": "hidden"}]), "does not match any of the expected tags"),
        (distil(losses=[{"kind": "relational", "layers": [["a", "b"], ["c", "d"]]}]), "at most 1"),
        (distil(cache={"max_bytes": -1}), "greater than or equal to 0"),
    ],
)
def test_what_makes_no_sense_is_refused(step: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        resolved(step)


def test_a_job_knows_the_models_that_it_names_and_where() -> None:
    spec = resolved(
        {"technique": "prune", "sparsity": 0.5, "training": {"distill": {"teacher": FIRST}}},
        {"technique": "finetune", "training": {"distill": {"teacher": ["uploaded", SECOND, FIRST]}}},
    )
    assert spec.named_models() == {
        FIRST: "/steps/0/training/distill/teacher",
        SECOND: "/steps/1/training/distill/teacher/1",
    }
    assert resolved(distil(STUDENT)).named_models() == {FIRST: "/steps/0/student/model"}
    assert resolved({"technique": "quantize"}).named_models() == {}
    assert ResolvedSpec.model_validate_json(spec.model_dump_json()).named_models() == spec.named_models()


PRUNE = {"technique": "prune", "sparsity": 0.5}


def test_a_student_takes_nothing_over_from_pruning() -> None:
    with pytest.raises(OrderRefused, match="put distill first") as caught:
        check_order(resolved(PRUNE, distil({"kind": "auto"})))
    assert caught.value.pointer == "/steps/1"
    check_order(resolved(PRUNE, distil()))
    check_order(resolved(distil({"kind": "auto"}), PRUNE, {"technique": "quantize"}))
    with pytest.raises(OrderRefused, match="cannot follow quantize"):
        check_order(resolved({"technique": "quantize"}, distil()))


@pytest.mark.parametrize(
    ("format", "student", "words"),
    [
        ("onnx", {"kind": "auto"}, "came with neither"),
        ("pt2", {"kind": "architecture", "config": {}}, "came with neither"),
        ("huggingface", {"kind": "architecture", "architecture": {"layers": [{"type": "ReLU"}]}}, "give config"),
        ("architecture", {"kind": "architecture", "config": {}}, "give architecture"),
        ("onnx", STUDENT, None),
        ("huggingface", {"kind": "auto"}, None),
    ],
)
def test_a_student_is_described_in_the_models_own_words(
    format: str, student: dict[str, Any], words: str | None
) -> None:
    spec = resolved(distil(student))
    if words is None:
        check(spec, model_facts(format=format), dataset_facts())
        return
    with pytest.raises(Unsupported, match=words) as caught:
        check(spec, model_facts(format=format), dataset_facts())
    assert caught.value.pointer == "/steps/0/student"


def test_layers_after_a_student_are_the_students() -> None:
    """They are not known at the submission, so nothing is said of them."""
    steps = (distil({"kind": "auto"}), {"technique": "quantize", "exclude": ["conv9"]})
    check(resolved(*steps), model_facts(), dataset_facts())


OTHER_PIXELS = (TensorFacts(name="input", shape=(1, 32, 32), dtype="float32"),)


@pytest.mark.parametrize(
    ("facts", "error", "words"),
    [
        ({"task": "regression"}, ModelsMismatch, "is a model for regression"),
        ({"classes": 11, "labels": None}, ModelsMismatch, "gives 11 outputs"),
        ({"labels": tuple("0123456798")}, ModelsMismatch, "calls its output 8 '9'"),
        ({"inputs": OTHER_PIXELS}, ModelsMismatch, r"takes float32 \[1, 32, 32\]"),
        ({"accepts": ("images",)}, DatasetMismatch, f"{FIRST}: The model takes images"),
        ({"labels": None}, None, ""),
        ({"parameters": 9}, None, ""),
    ],
)
def test_a_teacher_answers_the_same_question(
    facts: dict[str, Any], error: type[TersorError] | None, words: str
) -> None:
    spec = resolved(distil(teacher=FIRST))
    other = {FIRST: model_facts(**facts)}
    if error is None:
        check_named(spec, model_facts(), other, dataset_facts())
        return
    with pytest.raises(error, match=words) as caught:
        check_named(spec, model_facts(), other, dataset_facts())
    assert caught.value.pointer == "/steps/0/training/distill/teacher"


def test_a_student_has_to_be_trained_and_a_teacher_has_not() -> None:
    stiff = {FIRST: model_facts(trainable=False, untrainable_reason="It is a graph.")}
    check_named(resolved(distil(teacher=FIRST)), model_facts(), stiff, dataset_facts())
    with pytest.raises(Unsupported, match=r"The student cannot be trained\. It is a graph\.") as caught:
        check_named(resolved(distil(STUDENT)), model_facts(), stiff, dataset_facts())
    assert caught.value.pointer == "/steps/0/student/model"
