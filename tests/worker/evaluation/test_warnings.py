from __future__ import annotations

from typing import Any

import pytest

from app.contract.cast import Cast
from app.contract.compression import Compress
from app.contract.facts import DatasetFacts, LayerFacts, SplitFacts
from app.contract.mixed import Mixed
from app.contract.report import ArtifactReport, Latency, LayerReport, Measurement, Metric, StepReport
from app.contract.spec import Finetune, Prune, Quantize, ResolvedSpec, Step
from app.contract.training import EarlyStopping, Training
from app.contract.weight_only import WeightOnly
from tests.worker.helpers import mlp, tiny_model
from worker.evaluation.warnings import warnings
from worker.techniques.quantization.quantize import eligible_layers

FACTS = tiny_model(mlp()).facts
STATIC: tuple[Step, ...] = (Quantize(),)


def measurement(*, size: int = 1000, accuracy: float | None = 0.9, seconds: float = 1e-3) -> Measurement:
    metric = (
        None
        if accuracy is None
        else Metric(name="accuracy", value=accuracy, higher_is_better=True, split="test", samples=500)
    )
    latency = Latency(median_s=seconds, p95_s=seconds, batch_size=1, runs=30, threads=2)
    return Measurement(
        runtime="onnxruntime",
        size_bytes=size,
        parameters=1,
        nonzero_parameters=1,
        macs=1,
        metric=metric,
        latency=latency,
        peak_memory_bytes=1,
        layers=(),
    )


def artifact(name: str = "model.onnx", same_runtime: float | None = None, **figures: Any) -> ArtifactReport:
    own = measurement(**figures)
    speedup = 1e-3 / own.latency.median_s
    return ArtifactReport(
        name=name,
        format="onnx" if name.endswith(".onnx") else "native",
        sha256="",
        measurement=own,
        size_ratio=1000 / own.size_bytes,
        metric_change=None,
        speedup=speedup,
        speedup_same_runtime=speedup if same_runtime is None else same_runtime,
    )


def said(*artifacts: ArtifactReport, steps: tuple[Step, ...] = STATIC, accuracy: float | None = 0.9) -> tuple[str, ...]:
    spec = ResolvedSpec(model="m", dataset=None, recipe=None, steps=steps, export=("onnx",), seed=0)
    return warnings(spec, FACTS, None, measurement(accuracy=accuracy), artifacts)


def test_a_good_artifact_gets_none() -> None:
    assert said(artifact(size=300, seconds=5e-4)) == ()


def test_noise_is_no_warning() -> None:
    assert said(artifact(size=300, seconds=1.05e-3)) == ()


@pytest.mark.parametrize(
    ("one", "sentence"),
    [
        (
            artifact(size=300, seconds=2e-3),
            "model.onnx is slower than the uploaded model: 2 ms a sample (median, 2 threads) against 1 ms.",
        ),
        (
            artifact(size=300, seconds=5e-4, same_runtime=0.5),
            "model.onnx is slower than the uploaded model converted unchanged to onnxruntime: 0.5 ms a sample "
            "(median, 2 threads) against 0.25 ms. What it gains, it gains by its runtime.",
        ),
        (
            artifact(size=300, accuracy=0.85),
            "model.onnx is less accurate: accuracy 85.00% against 90.00% on 500 samples of test.",
        ),
        (artifact(size=1000), "model.onnx is not smaller than the upload (1,000 bytes against 1,000)."),
    ],
)
def test_what_got_worse_is_said_with_its_figures(one: ArtifactReport, sentence: str) -> None:
    assert said(one) == (sentence,)


def test_a_sparse_native_file_says_why_it_is_no_smaller() -> None:
    (sentence,) = said(artifact("model.safetensors"), steps=(Prune(sparsity=0.5),))
    assert sentence.endswith(
        "native keeps zeros in a dense file; export packed for a file that sparsity makes smaller."
    )


def test_the_worst_comes_first() -> None:
    worse = artifact(size=1000, seconds=2e-3, accuracy=0.8)
    kinds = [sentence.split(" is ")[1].split()[0] for sentence in said(worse)]
    assert kinds == ["slower", "less", "not"]


def test_missing_metric_and_float_leftovers() -> None:
    layers = (LayerFacts(name="0", type="Conv2d", shape=(1, 1, 3, 3), parameters=9),) * 2
    spec = ResolvedSpec(
        model="m", dataset=None, recipe=None, steps=(Quantize(method="dynamic"),), export=("native", "onnx"), seed=0
    )
    facts = FACTS.model_copy(update={"layers": layers})
    files = (artifact("model.pt", size=500, accuracy=None), artifact(size=300, accuracy=None))
    found = warnings(spec, facts, None, measurement(accuracy=None), files)
    assert found[0].startswith("The accuracy was not measured")
    assert "model.pt is floating point; the int8 weights are in model.onnx." in found
    assert "Dynamic quantization left 2 convolutions in floating point." in found
    either = spec.model_copy(update={"steps": (Quantize(or_dynamic=True),)})
    for method, told in (("static", False), ("dynamic", True)):
        made = files[1].model_copy(update={"details": {"method": method}})
        found = warnings(either, facts, None, measurement(accuracy=None), (made,))
        assert ("Dynamic quantization left 2 convolutions in floating point." in found) == told


def test_gpt2s_linear_layers_are_no_convolutions() -> None:
    layer = LayerFacts(name="0", type="Conv1D", shape=(4, 4), parameters=16)
    step = Quantize(method="dynamic")
    assert eligible_layers(step, (layer,)) == [layer]
    spec = ResolvedSpec(model="m", dataset=None, recipe=None, steps=(step,), export=("onnx",), seed=0)
    facts = FACTS.model_copy(update={"layers": (layer,)})
    assert warnings(spec, facts, None, measurement(), (artifact(size=300),)) == ()


@pytest.mark.parametrize(("split", "told"), [("validation", True), ("test", False)])
def test_accuracy_on_the_split_that_chose_the_weights_is_said(split: str, told: bool) -> None:
    step = Finetune(training=Training(epochs=1, early_stopping=EarlyStopping(patience=1)))
    spec = ResolvedSpec(model="m", dataset=None, recipe=None, steps=(step,), export=("onnx",), seed=0)
    metric = Metric(name="accuracy", value=0.9, higher_is_better=True, split=split, samples=500)
    uploaded = measurement().model_copy(update={"metric": metric})
    found = warnings(spec, FACTS, None, uploaded, (artifact(size=300),))
    assert (
        any(
            "by which the weights were chosen (early stopping, compress, max_accuracy_drop)" in sentence
            for sentence in found
        )
        is told
    )


def test_a_search_that_came_to_nothing_says_so_and_what_it_was_judged_by() -> None:
    spec = ResolvedSpec(model="m", dataset=None, recipe=None, steps=(Compress(),), export=("packed",), seed=0)
    metric = Metric(name="accuracy", value=0.9, higher_is_better=True, split="validation", samples=500)
    uploaded = measurement().model_copy(update={"metric": metric})
    for held in (True, False):
        step = StepReport(technique="compress", seconds=1.0, details={"held": held})
        found = warnings(spec, FACTS, None, uploaded, (artifact(size=300),), (step,))
        assert any("No round of compress held" in sentence for sentence in found) is not held
        assert any("early stopping, compress" in sentence for sentence in found)


def test_a_zip_is_deflated_and_blames_no_dense_file() -> None:
    (sentence,) = said(artifact("model.zip"), steps=(Prune(sparsity=0.5),))
    assert "dense" not in sentence


def test_splits_that_were_not_uploaded_are_named() -> None:
    own = SplitFacts(samples=80, inputs=(), targets="classes", made_from="train")
    splits = {name: own.model_copy(update={"samples": n}) for name, n in {"train": 80, "test": 20}.items()}
    data = DatasetFacts(kind="arrays", splits=splits, split_seed=7)
    spec = ResolvedSpec(model="m", dataset="d", recipe=None, steps=STATIC, export=("onnx",), seed=0)
    (sentence,) = warnings(spec, FACTS, data, measurement(), (artifact(size=300, seconds=5e-4),))
    assert "train (80) and test (20) were made of it at random with seed 7" in sentence


def test_a_rate_that_was_lowered_is_said() -> None:
    spec = ResolvedSpec(model="m", dataset=None, recipe=None, steps=(Finetune(),), export=("onnx",), seed=0)
    incident = {"step": 7, "learning_rate": 0.5, "what": "The training loss became nan"}
    for times, words in ((0, None), (1, "once"), (3, "3 times")):
        step = StepReport(technique="finetune", seconds=1.0, details={"training_diverged": [incident] * times})
        found = warnings(spec, FACTS, None, measurement(), (artifact(size=300),), (step,))
        told = [sentence for sentence in found if "diverged" in sentence]
        assert len(told) == (words is not None)
        for sentence in told:
            assert f"step 1 (finetune) diverged {words}" in sentence
            assert "first from 0.5. The training loss became nan." in sentence


@pytest.mark.parametrize(
    ("before", "after", "accuracy", "told"),
    [(0.9, 0.85, 0.9, True), (0.9, 0.85, 0.87, False), (0.9, 0.89, 0.9, False), (0.85, 0.9, 0.9, False)],
    ids=["a class is lost", "the accuracy shows it", "hardly", "better"],
)
def test_what_the_tasks_own_metric_hides_is_said(before: float, after: float, accuracy: float, told: bool) -> None:
    def with_f1(found: Measurement, value: float) -> Measurement:
        other = Metric(name="macro_f1", value=value, higher_is_better=True, split="test", samples=500)
        return found.model_copy(update={"other_metrics": (other,)})

    uploaded = with_f1(measurement(accuracy=0.9), before)
    one = artifact()
    one = one.model_copy(update={"measurement": with_f1(measurement(accuracy=accuracy), after)})
    spec = ResolvedSpec(model="m", dataset=None, recipe=None, steps=STATIC, export=("onnx",), seed=0)
    found = warnings(spec, FACTS, None, uploaded, [one])
    sentence = "is worse than its accuracy tells: macro f1 85.00% against 90.00% on 500 samples of test."
    assert any(sentence in said for said in found) is told


def few_bits(*stored: int) -> tuple[str, ...]:
    """What is said of an ONNX file that stores the weights of a step in so many bits."""
    names = [f"{number}.weight" for number in range(len(stored))]
    layers = tuple(
        LayerReport(name=name, shape=(8, 8), parameters=64, sparsity=0.0, bits=bits, sqnr_db=None)
        for name, bits in zip(names, stored, strict=True)
    )
    own = artifact(size=500)
    own = own.model_copy(update={"measurement": own.measurement.model_copy(update={"layers": layers})})
    details: dict[str, Any] = {"method": "weight_only", "layers": [{"name": name} for name in names]}
    spec = ResolvedSpec(model="m", dataset=None, recipe=None, steps=(WeightOnly(),), export=("onnx",), seed=0)
    steps = (StepReport(technique="quantize", seconds=1.0, details=details),)
    return warnings(spec, FACTS, None, measurement(), (own,), steps)


def test_weights_of_few_bits_that_are_stored_as_floats_are_named() -> None:
    assert few_bits(4, 4, 8) == ()
    (some,) = few_bits(4, 32, 32)
    assert some == "model.onnx holds 2 of 3 weights of few bits as floats: 1.weight, 2.weight."
    (every,) = few_bits(32, 32)
    assert every.startswith("model.onnx holds weights of few bits as floats: packed and pt2 store them in few bits")


def cast(step: Cast, name: str, *stored: int) -> tuple[str, ...]:
    """What is said of a file whose weights, called `name`s, take so many bits."""
    layers = tuple(
        LayerReport(name=f"{name}.{number}", shape=(8, 8), parameters=64, sparsity=0.0, bits=bits, sqnr_db=None)
        for number, bits in enumerate(stored)
    )
    own = artifact(size=500)
    own = own.model_copy(update={"measurement": own.measurement.model_copy(update={"layers": layers})})
    details: dict[str, Any] = {"method": "cast", "layers": [{"name": "w.0"}, {"name": "w.1"}]}
    spec = ResolvedSpec(model="m", dataset=None, recipe=None, steps=(step,), export=("onnx",), seed=0)
    steps = (StepReport(technique="quantize", seconds=1.0, details=details),)
    return warnings(spec, FACTS, None, measurement(), (own,), steps)


def test_casts_that_a_file_does_not_store_are_named() -> None:
    assert cast(Cast(), "w", 16, 16, 32) == ()  # the third was to stay as it is
    (some,) = cast(Cast(), "w", 16, 32, 32)
    assert some.startswith("model.onnx takes more than 16 bits for 1 of the 2 weights that bfloat16 holds (w.1)")
    (every,) = cast(Cast(dtype="float8_e4m3"), "other", 32, 32)  # a file with names of its own
    assert "8 bits for 2 of the 2 weights that float8_e4m3 holds (other.0, other.1)" in every
    assert cast(Cast(dtype="float8_e4m3"), "w", 8, 8) == ()


def limited(step: Step, details: dict[str, Any], of_artifact: bool, split: str = "test") -> tuple[str, ...]:
    """What is said of a step, or an artifact, with such details."""
    spec = ResolvedSpec(model="m", dataset=None, recipe=None, steps=(step,), export=("onnx",), seed=0)
    metric = Metric(name="accuracy", value=0.9, higher_is_better=True, split=split, samples=500)
    uploaded = measurement().model_copy(update={"metric": metric})
    own = artifact(size=300, accuracy=0.85)
    own = own.model_copy(update={"details": details if of_artifact else {}})
    reports = (StepReport(technique="quantize", seconds=1.0, details={} if of_artifact else details),)
    return warnings(spec, FACTS, None, uploaded, (own,), reports)


MIXED, INT8 = Mixed(max_accuracy_drop=0.01), Quantize(max_accuracy_drop=0.01)


@pytest.mark.parametrize(("step", "of_artifact"), [(MIXED, False), (INT8, True)])
def test_a_limit_that_was_not_held_is_said_first(step: Step, of_artifact: bool) -> None:
    details = {"method": "mixed", "held": False, "wanted_validation_metric": 0.89, "validation_metric": 0.8125}
    first, *_ = limited(step, details, of_artifact)
    assert first.startswith("The max_accuracy_drop was not held: 0.89 was wanted on validation")
    assert "0.8125 there before it is quantized" in first
    vain, *_ = limited(step, {"held": True, "layers": [], "layers_int8": 0}, of_artifact)
    assert vain == "Nothing was quantized: no integers held the max_accuracy_drop on the validation split."
    well = limited(step, {"held": True, "layers": [{"name": "0.weight"}], "layers_int8": 1}, of_artifact)
    assert not any("max_accuracy_drop" in sentence for sentence in well)


@pytest.mark.parametrize(("step", "held"), [(MIXED, {}), (INT8, {"held": True, "layers_int8": 3})])
def test_a_file_that_misses_what_another_form_of_it_held_says_so(step: Step, held: dict[str, Any]) -> None:
    told = {"wanted_validation_metric": 0.89, "delivered_validation_metric": 0.8825}
    first, *_ = limited(step, {**held, **told, "delivered_holds": False}, True)
    assert first.startswith("model.onnx misses the max_accuracy_drop: 0.89 was wanted on validation, and the file has")
    assert "0.8825 there" in first
    assert not any("misses" in sentence for sentence in limited(step, {**held, **told, "delivered_holds": True}, True))


def test_what_two_artifacts_have_to_tell_alike_is_told_once() -> None:
    details: Any = {"held": False, "wanted_validation_metric": 0.89, "validation_metric": 0.8125}
    both = [artifact(name, size=300).model_copy(update={"details": details}) for name in ("model.onnx", "program.pt2")]
    spec = ResolvedSpec(model="m", dataset=None, recipe=None, steps=(INT8,), export=("onnx", "pt2"), seed=0)
    found = warnings(spec, FACTS, None, measurement(), both, ())
    assert sum("was not held" in sentence for sentence in found) == 1


@pytest.mark.parametrize("step", [MIXED, INT8])
def test_bits_that_validation_chose_flatter_it(step: Step) -> None:
    assert any("flattered" in sentence for sentence in limited(step, {}, False, "validation"))
    assert not any("flattered" in sentence for sentence in limited(step, {}, False, "test"))
    assert not any("flattered" in sentence for sentence in limited(Quantize(), {}, False, "validation"))


PROGRAM = artifact("program.pt2", size=300, seconds=9e-3).model_copy(update={"format": "pt2"})


@pytest.mark.parametrize(
    ("details", "end"),
    [
        (
            {
                "compiled_median_s": 4e-4,
                "compiled_eager_s": 9e-3,
                "compiled_uploaded_s": 1e-3,
                "compiled_compile_s": 21.4,
            },
            ": 0.4 ms, the uploaded model 1 ms beside it (compiled once in 21 s).",
        ),
        (
            {
                "compiled_median_s": 4e-4,
                "compiled_eager_s": 9e-3,
                "compiled_uploaded_s": None,
                "compiled_compile_s": 21.4,
            },
            ": 0.4 ms, the program as it is 9 ms beside it (compiled once in 21 s).",
        ),
        ({"not_compiled": "there is no compiler"}, "; how fast was not measured, since there is no compiler."),
    ],
)
def test_a_program_that_is_slow_by_itself_says_first_what_makes_it_fast(details: Any, end: str) -> None:
    (sentence,) = said(PROGRAM.model_copy(update={"details": details}))
    assert sentence == (
        "program.pt2 is slower than the uploaded model: 9 ms a sample (median, 2 threads) against 1 ms. torch.compile, "
        f"with torch._inductor.config.freezing, is what makes it fast{end}"
    )


def test_a_program_that_stays_slow_when_compiled_says_so() -> None:
    details: Any = {"compiled_median_s": 2e-3, "compiled_uploaded_s": 1e-3, "compiled_compile_s": 21.4}
    (sentence,) = said(PROGRAM.model_copy(update={"details": details}))
    assert "is what makes it fast" not in sentence
    assert sentence.endswith("make it as fast: 2 ms, the uploaded model 1 ms beside it (compiled once in 21 s).")


def test_floats_name_the_files_with_the_integers() -> None:
    native, graph = artifact("model.safetensors", size=300), artifact(size=300)
    program = PROGRAM.model_copy(update={"speedup": 2.0, "speedup_same_runtime": 2.0})
    assert said(native, graph, program) == (
        "model.safetensors is floating point; the int8 weights are in model.onnx and program.pt2.",
    )
    dynamic = (Quantize(method="dynamic"),)
    (_, sentence) = said(native, graph, program, steps=dynamic)
    assert sentence == "program.pt2 is floating point; the int8 weights are in model.onnx."
