"""Model, dataset and steps that do not fit are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from app.contract.compatibility import check, label_map
from app.contract.errors import DatasetMismatch, InvalidSpec, OrderRefused, TersorError, Unsupported
from app.contract.facts import DatasetFacts, LayerFacts, SplitFacts, TensorFacts, calibration_split
from app.contract.recipes import resolve
from app.contract.spec import JobSpec
from app.contract.split_needs import check_splits
from app.contract.tasks import evaluation_split
from tests.contract.facts import dataset_facts, model_facts, split_facts

MODEL = "mdl_" + "0" * 26
PRUNE = {"technique": "prune", "sparsity": 0.5}
FINETUNE = {"technique": "finetune"}
QUANTIZE = {"technique": "quantize"}


def spec(*steps: dict[str, Any], **fields: Any) -> Any:
    return resolve(JobSpec.model_validate({"model": MODEL, "steps": steps} | fields))


def test_a_fitting_job_passes() -> None:
    check(spec(PRUNE, FINETUNE, QUANTIZE), model_facts(), dataset_facts())


def test_pruning_alone_needs_no_data() -> None:
    check(spec(PRUNE), model_facts(), None)


@pytest.mark.parametrize("later", [PRUNE, FINETUNE, QUANTIZE])
def test_nothing_follows_quantize(later: dict[str, Any]) -> None:
    with pytest.raises(OrderRefused, match="last step") as caught:
        check(spec(QUANTIZE, later), model_facts(), dataset_facts())
    assert caught.value.pointer == "/steps/1"


@pytest.mark.parametrize(
    ("method", "export", "words"),
    [
        ("static", ["native"], "delivered as onnx or pt2: add 'onnx' or 'pt2' to export"),
        ("dynamic", ["native", "pt2"], "delivered as onnx: add 'onnx' to export"),
    ],
)
def test_int8_must_be_exported_where_it_lives(method: str, export: list[str], words: str) -> None:
    with pytest.raises(OrderRefused, match=words) as caught:
        check(spec(QUANTIZE | {"method": method}, export=export), model_facts(), dataset_facts())
    assert caught.value.pointer == "/export"


@pytest.mark.parametrize("export", [["pt2"], ["onnx", "pt2"], ["onnx"]])
def test_static_int8_goes_into_either_artifact_or_both(export: list[str]) -> None:
    check(spec(QUANTIZE, export=export), model_facts(), dataset_facts())


def test_a_graph_that_torch_does_not_compute_has_no_program() -> None:
    facts = model_facts(format="onnx", trainable=False, untrainable_reason="Its graph holds control flow (If).")
    check(spec(PRUNE, export=["onnx"]), facts, None)
    with pytest.raises(Unsupported, match=r"export onnx instead.*control flow") as caught:
        check(spec(PRUNE, export=["onnx", "pt2"]), facts, None)
    assert caught.value.pointer == "/export"


TRAIN_ONLY = dataset_facts("train")
UNLABELLED = dataset_facts(splits={"train": split_facts(targets=None, target_min=None, target_max=None)})
STOPPING = {"technique": "finetune", "training": {"early_stopping": {}}}


@pytest.mark.parametrize(
    ("step", "dataset", "pointer", "words"),
    [
        (FINETUNE, None, "/dataset", "names no dataset"),
        (FINETUNE, dataset_facts("test"), "/steps/0", r"has test \(100, classes\)"),
        (FINETUNE, UNLABELLED, "/steps/0", "no targets"),
        (FINETUNE, dataset_facts(splits={"train": split_facts(targets="values")}), "/dataset", "learns from classes"),
        (STOPPING, TRAIN_ONLY, "/steps/0", "`validation`"),
        (QUANTIZE, dataset_facts("test"), "/steps/0", "calibration"),
        (QUANTIZE, None, "/dataset", "names no dataset"),
        (PRUNE, dataset_facts(kind="text"), "/dataset", "takes arrays or images; the dataset holds text"),
        (PRUNE, dataset_facts(splits={"train": split_facts(target_max=10)}), "/dataset", "10 classes"),
        (PRUNE, dataset_facts(splits={"train": split_facts(target_min=-1)}), "/dataset", "negative"),
    ],
)
def test_mismatch_names_what_is_missing(
    step: dict[str, Any], dataset: DatasetFacts | None, pointer: str, words: str
) -> None:
    with pytest.raises(DatasetMismatch, match=words) as caught:
        check(spec(step), model_facts(), dataset)
    assert caught.value.pointer == pointer


DISTILLED = {"technique": "finetune", "training": {"distill": {}}}


def test_a_teacher_stands_in_for_targets() -> None:
    check(spec(DISTILLED), model_facts(), UNLABELLED)
    stopping = {"technique": "finetune", "training": {"distill": {}, "early_stopping": {}}}
    with pytest.raises(DatasetMismatch, match="Early stopping"):
        check(spec(stopping), model_facts(), UNLABELLED)
    plateau = {"technique": "finetune", "training": {"distill": {}, "schedule": "plateau"}}
    with pytest.raises(DatasetMismatch, match="Schedule plateau needs a `validation` split"):
        check(spec(plateau), model_facts(), UNLABELLED)


def test_a_task_without_a_loss_needs_a_teacher() -> None:
    embedding = model_facts(task="sentence-embedding")
    check(spec(DISTILLED), embedding, dataset_facts("train"))
    with pytest.raises(Unsupported, match="distill"):
        check(spec(FINETUNE), embedding, dataset_facts("train"))


def test_the_classes_of_an_embedding_are_the_datasets_own() -> None:
    many = dataset_facts(splits={"test": split_facts(target_max=5000)}, labels=tuple(map(str, range(5001))))
    check(spec(PRUNE), model_facts(task="sentence-embedding"), many)
    with pytest.raises(DatasetMismatch, match="10 classes"):
        check(spec(PRUNE), model_facts(), many)


def test_splits_can_be_checked_before_the_model_is_known() -> None:
    check_splits(spec(FINETUNE, QUANTIZE), dataset_facts("train"))
    with pytest.raises(DatasetMismatch, match="names no dataset"):
        check_splits(spec(PRUNE, FINETUNE), None)


@pytest.mark.parametrize(
    ("shape", "dtype", "fits"),
    [
        ((1, 28, 28), "float32", True),
        ((None, 28, 28), "float32", True),
        ((1, 28, 28), "float64", True),
        ((3, 28, 28), "float32", False),
        ((784,), "float32", False),
        ((1, 28, 28), "uint8", False),
    ],
)
def test_shapes_and_kinds_of_number(shape: tuple[int | None, ...], dtype: str, fits: bool) -> None:
    given = split_facts(inputs=(TensorFacts(name="x", shape=shape, dtype=dtype),))
    run = lambda: check(spec(PRUNE), model_facts(), dataset_facts(splits={"test": given}))  # noqa: E731
    if fits:
        run()
    else:
        with pytest.raises(DatasetMismatch, match=r"the model takes float32 \[1, 28, 28\]"):
            run()


def test_several_inputs_go_by_name() -> None:
    ids = TensorFacts(name="input_ids", shape=(None,), dtype="int64")
    mask = TensorFacts(name="attention_mask", shape=(None,), dtype="int64")
    model = model_facts(inputs=(ids, mask))
    check(spec(PRUNE), model, dataset_facts(splits={"test": split_facts(inputs=(mask, ids))}))
    with pytest.raises(DatasetMismatch, match="lacks the input 'attention_mask'"):
        check(spec(PRUNE), model, dataset_facts(splits={"test": split_facts(inputs=(ids,))}))


def test_labels_go_by_name_then_by_order() -> None:
    def of(*labels: str) -> DatasetFacts:
        return dataset_facts(labels=labels)

    assert label_map(model_facts(labels=("cat", "dog"), classes=2), of("dog", "cat")) == (1, 0)
    assert label_map(model_facts(labels=("cat", "dog"), classes=2), of("dog")) == (1,)
    assert label_map(model_facts(labels=("LABEL_0", "LABEL_1"), classes=2), of("ham", "spam")) == (0, 1)
    assert label_map(model_facts(labels=None, classes=2), of("ham", "spam")) == (0, 1)
    for labels in (("cat", "bird"), ("a", "b", "c")):
        with pytest.raises(DatasetMismatch):
            label_map(model_facts(labels=("cat", "dog"), classes=2), of(*labels))
    with pytest.raises(DatasetMismatch, match="3 labels and the model 2"):
        label_map(model_facts(labels=None, classes=2), of("a", "b", "c"))


def test_a_model_without_weights_cannot_be_pruned() -> None:
    norms = model_facts(layers=(LayerFacts(name="0", type="BatchNorm2d", shape=(3,), parameters=6),))
    with pytest.raises(Unsupported, match="can be pruned"):
        check(spec(PRUNE), norms, None)


@pytest.mark.parametrize("technique", [PRUNE, QUANTIZE])
def test_a_pattern_that_matches_no_layer_is_refused(technique: dict[str, Any]) -> None:
    check(spec(technique | {"exclude": ["1"]}), model_facts(), dataset_facts())
    with pytest.raises(InvalidSpec, match="layers are 1") as caught:
        check(spec(technique | {"exclude": ["1", "fc*"]}), model_facts(), dataset_facts())
    assert caught.value.pointer == "/steps/0/exclude/1"


def test_which_split_serves_what() -> None:
    bare = SplitFacts(samples=1, inputs=(), targets=None)
    assert evaluation_split(dataset_facts("train", "validation", "test"), "image-classification") == "test"
    assert evaluation_split(dataset_facts("train", "validation"), "image-classification") == "validation"
    assert evaluation_split(dataset_facts(splits={"test": bare}), "image-classification") is None
    assert evaluation_split(dataset_facts(splits={"test": bare}), "causal-lm") == "test"  # a text is its own target
    assert evaluation_split(None, "image-classification") is None
    assert calibration_split(dataset_facts("test", "train", "calibration")) == "calibration"
    assert calibration_split(dataset_facts("test")) is None  # never calibrate on what is measured


def test_every_error_has_a_code_and_a_sentence() -> None:
    from app.contract.errors import problem_classes

    for code, cls in problem_classes().items():
        if not cls.__module__.startswith("app.contract"):
            continue  # those of the web layer say what a request did
        problem = cls().problem()
        assert problem.code == code
        assert problem.detail.endswith((".", "`")), code
        assert problem.title
    assert issubclass(DatasetMismatch, TersorError)


@pytest.mark.parametrize(("shape", "words"), [((1, 32, 32), "32 x 32"), ((3, None, 28), "different sizes")])
def test_pictures_of_another_size_than_the_architecture_takes(shape: tuple[int | None, ...], words: str) -> None:
    pictures = split_facts(inputs=(TensorFacts(name="image", shape=shape, dtype="uint8"),))
    with pytest.raises(DatasetMismatch, match=f"{words}.* takes 28 x 28"):
        check(spec(PRUNE), model_facts(), DatasetFacts(kind="images", splits={"train": pictures}))


def test_a_folder_with_its_own_processor_resizes_pictures() -> None:
    pictures = split_facts(inputs=(TensorFacts(name="image", shape=(3, None, None), dtype="uint8"),))
    check(spec(PRUNE), model_facts(format="huggingface"), DatasetFacts(kind="images", splits={"train": pictures}))


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        ("multi-label", {"binary": False, "target_shape": (10,)}, "0 or 1"),
        ("multi-label", {"binary": True, "target_shape": (3,)}, r"\[3\] a sample; the model gives \[10\]"),
        ("regression", {"target_shape": (2, 4)}, r"\[2, 4\]"),
    ],
)
def test_values_have_the_shape_of_the_output(task: str, changes: dict[str, Any], words: str) -> None:
    split = split_facts(targets="values", target_min=None, target_max=None, **changes)
    with pytest.raises(DatasetMismatch, match=words):
        check(spec(PRUNE), model_facts(task=task), dataset_facts(splits={"train": split}))


def test_values_that_fit() -> None:
    single = split_facts(targets="values", target_min=None, target_max=None, target_shape=())
    one = model_facts(task="regression", classes=1, labels=None)
    check(spec(FINETUNE), one, dataset_facts(splits={"train": single}))
    labels = split_facts(targets="values", target_min=None, target_max=None, target_shape=(10,), binary=True)
    check(spec(FINETUNE), model_facts(task="multi-label"), dataset_facts(splits={"train": labels}))


@pytest.mark.parametrize("step", [FINETUNE, PRUNE | {"training": {}}])
def test_a_model_that_runs_as_it_is_is_not_trained(step: dict[str, Any]) -> None:
    facts = model_facts(format="onnx", trainable=False, untrainable_reason="Operator Det has no trainable form here.")
    check(spec(PRUNE, QUANTIZE), facts, dataset_facts())
    with pytest.raises(Unsupported, match=r"cannot be trained\. Operator Det") as caught:
        check(spec(PRUNE, step), facts, dataset_facts())
    assert caught.value.pointer == "/steps/1"


@pytest.mark.parametrize(
    ("size", "shape", "fits"),
    [
        ((None, None), (3, 20, 30), True),
        ((None, 30), (3, 20, 30), True),
        ((None, 30), (3, 20, 31), False),
        ((None, None), (3, None, 30), False),
    ],
)
def test_open_sizes_take_pictures_of_any_one_size(
    size: tuple[int | None, ...], shape: tuple[int | None, ...], fits: bool
) -> None:
    facts = model_facts(format="onnx", inputs=(TensorFacts(name="x", shape=(3, *size), dtype="float32"),))
    picture = TensorFacts(name="image", shape=shape, dtype="uint8")
    dataset = dataset_facts(kind="images", splits={"train": split_facts(inputs=(picture,))})
    if fits:
        check(spec(FINETUNE), facts, dataset)
        return
    with pytest.raises(DatasetMismatch, match="the model takes any x"):
        check(spec(FINETUNE), facts, dataset)
