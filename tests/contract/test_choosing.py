"""What method auto becomes."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from app.contract.automatic import Automatic
from app.contract.choosing import choose, settled
from app.contract.compatibility import check
from app.contract.errors import DatasetMismatch, InvalidSpec, OrderRefused, Unsupported
from app.contract.facts import DatasetFacts, LayerFacts, ModelFacts, SplitFacts, TensorFacts
from app.contract.recipes import resolve
from app.contract.spec import JobSpec, Quantize
from app.contract.weight_only import WeightOnly

MODEL, DATASET = "mdl_" + "0" * 26, "dst_" + "0" * 26
INPUT = TensorFacts(name="input", shape=(4,), dtype="float32")


def model(task: str = "image-classification", format: str = "architecture", layer: str = "Conv2d") -> ModelFacts:
    shape = (8, 4, 1, 1) if layer == "Conv2d" else (8, 4)
    return ModelFacts.model_validate(
        {
            "format": format,
            "task": task,
            "accepts": ("arrays",),
            "inputs": (INPUT,),
            "classes": 8,
            "parameters": 32,
            "layers": (LayerFacts(name="0", type=layer, shape=shape, parameters=32),),
        }
    )


SAMPLES = DatasetFacts(kind="arrays", splits={"calibration": SplitFacts(samples=9, inputs=(INPUT,))})


def auto(**fields: Any) -> Automatic:
    return Automatic.model_validate(fields)


def test_static_where_there_are_samples() -> None:
    choice = choose(auto(exclude=["0"]), model(), SAMPLES, ("onnx",), "/steps/0")
    assert choice.step == Quantize(method="static", activations="uint8", exclude=("0",))
    assert "There are samples" in choice.why


@pytest.mark.parametrize(("target", "activations"), [("x86", "uint8"), ("arm", "int8"), ("cuda", "int8")])
def test_activations_as_the_target_multiplies_them(target: str, activations: str) -> None:
    step = choose(auto(target=target), model(layer="Linear"), SAMPLES, ("onnx",), "/steps/0").step
    assert isinstance(step, Quantize)
    assert step.activations == activations


def layers(*types: str) -> tuple[LayerFacts, ...]:
    """Of a thousand weights each, but norms, which have ten."""
    return tuple(
        LayerFacts(name=str(place), type=kind, shape=(10,) if kind.endswith("Norm") else (10, 100), parameters=size)
        for place, kind in enumerate(types)
        for size in (10 if kind.endswith("Norm") else 1000,)
    )


BERT = ("Embedding", "LayerNorm", *("Linear",) * 12)


@pytest.mark.parametrize(
    ("target", "types", "either"),
    [
        ("x86", BERT, True),
        ("x86", ("Conv2d", "T5LayerNorm", *("MultiheadAttention",) * 12), True),
        ("arm", BERT, False),
        ("cuda", BERT, False),
        ("x86", ("Linear", "Linear"), False),
        ("x86", ("Conv2d", "LayerNorm", "Linear"), False),
        ("x86", ("Embedding", "LayerNorm"), False),
    ],
)
def test_of_transformers_both_files_are_made_where_the_target_is_like_the_worker(
    target: str, types: tuple[str, ...], either: bool
) -> None:
    facts = model().model_copy(update={"layers": layers(*types)})
    choice = choose(auto(target=target), facts, SAMPLES, ("onnx",), "/steps/0")
    assert isinstance(choice.step, Quantize)
    assert (choice.step.method, choice.step.or_dynamic) == ("static", either)
    assert ("Dynamic int8 is tried besides" in choice.why) == either


def test_a_program_of_torch_is_static_and_nothing_else_is_told() -> None:
    facts = model().model_copy(update={"layers": layers(*BERT)})
    choice = choose(auto(), facts, SAMPLES, ("onnx", "pt2"), "/steps/0")
    assert isinstance(choice.step, Quantize)
    assert not choice.step.or_dynamic
    assert "Dynamic" not in choice.why


def test_dynamic_without_samples_and_never_for_convolutions_alone() -> None:
    step = choose(auto(), model(layer="Linear"), None, ("onnx",), "/steps/0").step
    assert step.method == "dynamic"
    with pytest.raises(DatasetMismatch, match="give a dataset") as refused:
        choose(auto(), model(), None, ("onnx",), "/steps/0")
    assert refused.value.pointer == "/dataset"


@pytest.mark.parametrize(
    ("target", "data", "symmetric", "algorithm", "embeddings"),
    [
        ("x86", SAMPLES, False, "gptq", 8),
        ("arm", None, False, "rtn", 8),
        ("cuda", SAMPLES, True, "gptq", 8),
        ("vllm", None, True, "rtn", None),
    ],
)
def test_language_models_have_weights_of_four_bits(
    target: str, data: DatasetFacts | None, symmetric: bool, algorithm: str, embeddings: int | None
) -> None:
    step = choose(auto(target=target), model("causal-lm", "huggingface", "Linear"), data, ("onnx",), "/steps/0").step
    assert isinstance(step, WeightOnly)
    assert (step.bits, step.symmetric, step.algorithm, step.embeddings) == (4, symmetric, algorithm, embeddings)


def test_vllm_is_for_language_models_and_their_folder() -> None:
    with pytest.raises(Unsupported, match="vLLM runs causal language models") as refused:
        choose(auto(target="vllm"), model(), SAMPLES, ("onnx",), "/steps/0")
    assert refused.value.pointer == "/steps/0/target"
    spec = {"model": MODEL, "steps": [{"technique": "quantize", "method": "auto", "target": "vllm"}]}
    language = model("causal-lm", "huggingface", "Linear")
    with pytest.raises(InvalidSpec, match="name it in export") as exported:
        settled(resolve(JobSpec.model_validate(spec)), language, None)
    assert exported.value.pointer == "/export"
    check(resolve(JobSpec.model_validate(spec | {"export": ["compressed-tensors"]})), language, None)


def test_other_steps_stay_and_auto_is_checked_as_what_it_becomes() -> None:
    steps = [{"technique": "prune", "sparsity": 0.5}, {"technique": "quantize", "method": "auto"}]
    spec = resolve(JobSpec.model_validate({"model": MODEL, "dataset": DATASET, "steps": steps}))
    found = settled(spec, model(), SAMPLES)
    assert found.steps[0] is spec.steps[0]
    assert found.steps[1] == Quantize(method="static", activations="uint8")
    assert settled(found, model(), SAMPLES) == found
    only_packed = resolve(
        JobSpec.model_validate({"model": MODEL, "dataset": DATASET, "steps": steps, "export": ["packed"]})
    )
    with pytest.raises(OrderRefused, match="onnx"):  # int8 lives in that file
        check(only_packed, model(), SAMPLES)


def test_an_unknown_method_is_told_all_that_there_are() -> None:
    with pytest.raises(
        ValidationError, match="one of static, dynamic, weight_only, mixed, codebook, qat, cast, auto"
    ) as refused:
        JobSpec.model_validate({"model": MODEL, "steps": [{"technique": "quantize", "method": "nothing"}]})
    assert refused.value.errors()[0]["loc"][-1] == "method"
