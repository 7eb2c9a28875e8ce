"""The step on real digits: weights on their grids, the trained grids in the file, masks held, better than without."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from app.contract.distillation import Distill
from app.contract.pruning import Prune
from app.contract.qat import Qat
from app.contract.spec import Finetune
from app.contract.training import Training
from app.contract.weight_only import WeightOnly
from tests.worker.helpers import context_for, convnet, digits_data, mlp, tiny_model
from tests.worker.loading.onnx_files import model, noise
from worker.constraints import baked, masks
from worker.context import Context
from worker.export.registry import Exported, write_onnx, write_program
from worker.loading import load_model
from worker.techniques.base import Details
from worker.techniques.pruning.prune import PruneTechnique
from worker.techniques.quantization.quantize import QuantizeTechnique
from worker.techniques.quantization.stored import stored_weights
from worker.techniques.training.finetune import FinetuneTechnique

PICTURES, FLAT = (1, 8, 8), (64,)
TRAINING = Training(epochs=2, lr=2e-4, distill=Distill())


class Mobile(nn.Module):
    """A residual block with a depthwise convolution, norms and a sum: what networks for pictures are made of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 1, bias=False),
            nn.BatchNorm2d(16),
        )
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(16 * 4 * 4, 10)

    def forward(self, given: Tensor) -> Tensor:
        found = self.stem(given)
        out: Tensor = self.head(self.pool(torch.relu(found + self.block(found))).flatten(1))
        return out


class Twice(nn.Module):
    """A weight of two layers, the second of which reads what reaches further; `twice`: of one layer, behind a ReLU and
    on what is below zero too, and `most` is where the ReLU clips."""

    def __init__(self, twice: bool = False, most: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 64)
        self.second = self.first if twice else nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.between = nn.ReLU() if most is None else nn.Hardtanh(0.0, most)
        self.head = nn.Linear(64, 10)

    def forward(self, given: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.second(self.between(8 * self.first(given - 0.5)))))
        return out


NETS: dict[str, tuple[type[nn.Module] | Any, tuple[int, ...]]] = {
    "mlp": (mlp, FLAT),
    "convnet": (convnet, PICTURES),
    "mobile": (Mobile, PICTURES),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, nn.Module]:
    found = {}
    for name, (make, shape) in NETS.items():
        context = context_for(tiny_model(make(), shape=shape), digits_data(shape), tmp_path_factory.mktemp(name))
        FinetuneTechnique().apply(Finetune(training=Training(epochs=8, lr=3e-3)), context)
        found[name] = context.model.module
    return found


def context_of(trained: dict[str, nn.Module], name: str, folder: Path) -> Context:
    shape = NETS[name][1]
    folder.mkdir(exist_ok=True)
    return context_for(tiny_model(copy.deepcopy(trained[name]), shape=shape), digits_data(shape), folder)


def quantize(context: Context, **fields: Any) -> Details:
    return QuantizeTechnique().apply(Qat(**{"training": TRAINING} | fields), context)


def exported(context: Context) -> Exported:
    return write_onnx(baked(context.model.module).cpu().eval(), context, context.scratch)


def rows_of(details: Details, name: str = "layers") -> list[dict[str, Any]]:
    rows = details[name]
    assert isinstance(rows, list)
    return rows  # type: ignore[return-value]


@pytest.mark.parametrize("net", list(NETS))
def test_the_file_has_the_grids_that_were_trained(trained: dict[str, nn.Module], net: str, tmp_path: Path) -> None:
    """Every weight of the graph whose norms are folded lies on the codes of the file: nothing is rounded again."""
    context = context_of(trained, net, tmp_path)
    rows = rows_of(quantize(context, activations="uint8"))
    one = exported(context)
    assert one.reference is not None
    floats = {weight.name: weight.values for weight in stored_weights(onnx.load(one.reference))}
    weights = [weight for weight in stored_weights(onnx.load(one.path)) if weight.scale is not None]
    assert {weight.name for weight in weights} == {row["name"] for row in rows}
    for weight in weights:
        assert weight.values.dtype == np.int8
        assert np.abs(weight.values.astype(int)).max() <= 63
        np.testing.assert_allclose(
            weight.dequantized(), floats[weight.name], atol=1e-3 * float(np.max(weight.scale)), err_msg=weight.name
        )
    scales = activation_scales(onnx.load(one.path))
    for row in rows:
        step = (row["input_high"] - row["input_low"]) / 255
        assert any(scale == pytest.approx(step, rel=1e-4) for scale in scales), row["name"]


def activation_scales(proto: onnx.ModelProto) -> list[float]:
    arrays = {one.name: numpy_helper.to_array(one) for one in proto.graph.initializer}
    return [float(arrays[node.input[1]]) for node in proto.graph.node if node.op_type == "QuantizeLinear"]


@pytest.mark.parametrize("net", ["mlp", "mobile"])
def test_the_file_gives_what_training_saw(trained: dict[str, nn.Module], net: str, tmp_path: Path) -> None:
    """Nearer to the module, which is float, than its answers are apart; and as right as the upload."""
    context = context_of(trained, net, tmp_path)
    quantize(context)
    one = exported(context)
    session = ort.InferenceSession(str(one.path))
    assert context.feed is not None
    batch = next(iter(context.feed.batches("test", 447)))
    assert batch.targets is not None
    got = session.run(None, {"input": batch.inputs[0].numpy()})[0]
    with torch.no_grad():
        before = trained[net].eval()(*batch.inputs).numpy()
        module = context.model.module.eval()(*batch.inputs).numpy()
    assert np.square(got - module).sum() < 1e-3 * np.square(module).sum()
    right, was = (float((out.argmax(1) == batch.targets.numpy()).mean()) for out in (got, before))
    assert right >= was - 0.01


def file_and_module(context: Context) -> tuple[np.ndarray, np.ndarray]:
    """What the int8 file gives for the test split, and what the module gives that rounds what it was trained to."""
    assert context.feed is not None
    (pictures,) = next(iter(context.feed.batches("test", 447))).inputs
    session = ort.InferenceSession(str(exported(context).path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        return session.run(None, {"input": pictures.numpy()})[0], context.model.module.eval()(pictures).numpy()


def near(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.square(one - other).sum() < 1e-2 * np.square(other).sum())


def test_layers_that_share_a_weight_are_all_calibrated_and_trained(tmp_path: Path) -> None:
    context = context_for(tiny_model(Twice()), digits_data(), tmp_path)
    rows = {row["name"]: row for row in rows_of(quantize(context))}
    assert set(rows) == {"first.weight", "head.weight"}
    assert rows["first.weight"]["input_low"] < -0.3
    assert rows["first.weight"]["input_high"] > 2  # what comes into the second one
    assert set(context.ranges) == {"first.weight", "second.weight", "head.weight"}
    assert near(*file_and_module(context))


@pytest.mark.parametrize("most", [None, 1.0])
def test_the_file_clips_where_a_range_reaches_past(most: float | None, tmp_path: Path) -> None:
    """The range that a layer's two inputs share is below zero, and so behind the ReLU, which has to stay."""
    context = context_for(tiny_model(Twice(twice=True, most=most)), digits_data(), tmp_path)
    (row, _) = rows_of(quantize(context))
    assert row["input_low"] < -0.3
    found, expected = file_and_module(context)
    assert near(found, expected)
    program = write_program(baked(context.model.module).cpu().eval(), context, context.scratch)
    assert context.feed is not None
    with torch.no_grad():
        outputs = torch.export.load(program.path).module()(*next(iter(context.feed.batches("test", 447))).inputs)
    assert near(outputs.numpy(), expected)


def test_nodes_of_an_uploaded_graph_that_share_a_weight_are_too(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gemm", ["input", "shared", "bias"], ["a"], transB=1),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Mul", ["b", "eight"], ["c"]),
        helper.make_node("Gemm", ["c", "shared", "bias"], ["d"], transB=1),
        helper.make_node("Relu", ["d"], ["e"]),
        helper.make_node("Gemm", ["e", "last"], ["y"], transB=1),
    ]
    held = {"shared": noise(64, 64) / 8, "bias": noise(64, seed=1) / 8, "last": noise(10, 64, seed=2) / 8}
    proto = model(nodes, {"input": noise(2, 64)}, held | {"eight": np.array(8, np.float32)})
    (tmp_path / "upload.onnx").write_bytes(proto.SerializeToString())
    loaded = load_model(tmp_path / "upload.onnx", "upload.onnx", {"task": "image-classification"}, tmp_path)
    context = context_for(loaded, digits_data(), tmp_path)
    (shared, _) = rows_of(quantize(context))
    assert shared["input_high"] > 2
    assert near(*file_and_module(context))


@pytest.mark.parametrize("kind", ["relational", "contrastive", "hidden_states"])
def test_losses_on_features_find_their_layers(trained: dict[str, nn.Module], kind: str, tmp_path: Path) -> None:
    context = context_of(trained, "mlp", tmp_path)
    training = Training.model_validate({"steps": 3, "lr": 1e-4, "distill": {"losses": [{"kind": kind}]}})
    assert len(rows_of(quantize(context, training=training))) == 3


@pytest.mark.parametrize("symmetric", [True, False])
def test_four_bits_lie_in_groups_and_are_stored_so(
    trained: dict[str, nn.Module], symmetric: bool, tmp_path: Path
) -> None:
    context = context_of(trained, "mlp", tmp_path)
    rows = rows_of(quantize(context, bits=4, group_size=32, symmetric=symmetric))
    for row in rows:
        runs = context.model.module.get_parameter(row["name"]).detach().reshape(-1, row["group"])
        assert max(len(run.unique()) for run in runs) <= 16
        assert "input_low" not in row
    assert context.quantization is None
    stored = {weight.name: weight for weight in stored_weights(onnx.load(exported(context).path))}
    assert [stored[row["name"]].few_bits for row in rows] == [4, 4, 4]


def test_training_wins_back_what_rounding_cost(trained: dict[str, nn.Module], tmp_path: Path) -> None:
    """Two bits, one step an output; all begin with the same grids."""
    contexts = [context_of(trained, "mlp", tmp_path / name) for name in ("trained", "fixed", "rounded")]
    long = Training(epochs=25, lr=1e-3, schedule="cosine", distill=Distill())
    quantize(contexts[0], bits=2, group_size=None, symmetric=True, training=long)
    quantize(contexts[1], bits=2, group_size=None, symmetric=True, steps="fixed", training=long)
    rtn = WeightOnly(bits=2, group_size=None, symmetric=True, algorithm="rtn")
    QuantizeTechnique().apply(rtn, contexts[2])
    learned, fixed, rounded = (distance(context, trained["mlp"]) for context in contexts)
    # Which of the two is the better one hangs on how a processor rounds its sums.
    assert max(learned, fixed) < 0.1 * rounded, (learned, fixed, rounded)
    assert learned < 1.5 * fixed, (learned, fixed, rounded)


def distance(context: Context, other: nn.Module) -> float:
    """Mean squared distance of the answers' chances from another network's, on the test split."""
    assert context.feed is not None
    batch = next(iter(context.feed.batches("test", 447)))
    with torch.no_grad():
        one, two = (net.eval()(*batch.inputs).softmax(1) for net in (context.model.module, other))
    return float((one - two).square().mean())


def test_steps_learn_unless_they_are_fixed(trained: dict[str, nn.Module], tmp_path: Path) -> None:
    found = {}
    for steps in ("learned", "fixed"):
        context = context_of(trained, "mlp", tmp_path / steps)
        rows = rows_of(quantize(context, steps=steps))
        found[steps] = {row["name"]: row["input_high"] for row in rows}
        other = context_of(trained, "mlp", tmp_path / f"{steps} longer")
        rows = rows_of(quantize(other, steps=steps, training=TRAINING.model_copy(update={"epochs": 4})))
        same = all(row["input_high"] == found[steps][row["name"]] for row in rows)
        assert same == (steps == "fixed")


@pytest.mark.parametrize(("bits", "net"), [(8, "mobile"), (4, "mlp")])
def test_what_was_pruned_stays_zero(trained: dict[str, nn.Module], bits: int, net: str, tmp_path: Path) -> None:
    context = context_of(trained, net, tmp_path)
    PruneTechnique().apply(Prune(sparsity=0.6), context)
    held = {name: mask.clone() for name, mask in masks(context.model.module).items()}
    quantize(context, bits=bits)
    assert held.keys() == masks(context.model.module).keys()
    module = baked(context.model.module)
    for name, mask in held.items():
        weight = module.get_parameter(name).detach()
        assert not weight[~mask].any()
        assert not torch.signbit(weight[weight == 0]).any()
    for stored in stored_weights(onnx.load(exported(context).path)):
        if stored.name in held:
            assert stored.zeros() >= int((~held[stored.name]).sum())


def test_what_is_excluded_stays_float(trained: dict[str, nn.Module], tmp_path: Path) -> None:
    context = context_of(trained, "mlp", tmp_path)
    details = quantize(context, exclude=("4",))
    assert [row["name"] for row in rows_of(details, "layers_left_in_float")] == ["4.weight"]
    stored = {weight.name: weight.bits for weight in stored_weights(onnx.load(exported(context).path))}
    assert stored == {"0.weight": 8, "2.weight": 8, "4.weight": 32}


def test_what_only_the_file_rounds_is_told_apart_from_floats(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Flatten(), nn.Linear(1024, 10)
    )
    context = context_for(tiny_model(module, shape=PICTURES), digits_data(PICTURES), tmp_path)
    details = quantize(context, exclude=("3",))
    assert [row["name"] for row in rows_of(details)] == ["0.weight"]
    assert [row["name"] for row in rows_of(details, "layers_not_trained")] == ["1.weight"]
    assert [row["name"] for row in rows_of(details, "layers_left_in_float")] == ["3.weight"]
    stored = {weight.name: weight.bits for weight in stored_weights(onnx.load(exported(context).path))}
    assert stored == {"0.weight": 8, "1.weight": 8, "3.weight": 32}
    few = context_for(tiny_model(module, shape=PICTURES), digits_data(PICTURES), tmp_path)
    details = quantize(few, bits=4)
    assert [row["name"] for row in rows_of(details, "layers_left_in_float")] == ["1.weight"]
    assert "layers_not_trained" not in details


def test_the_report_has_what_rounding_cost(trained: dict[str, nn.Module], tmp_path: Path) -> None:
    """Without a rate worth the name what was trained is what was uploaded: 10 log10(|w|^2 / |w - w'|^2) by hand."""
    context = context_of(trained, "mlp", tmp_path)
    before = {name: weight.detach().clone() for name, weight in context.model.module.named_parameters()}
    rows = rows_of(quantize(context, training=Training(steps=1, lr=1e-9, distill=Distill())))
    for row in rows:
        one, other = before[row["name"]].double(), context.model.module.get_parameter(row["name"]).detach().double()
        noise_db = 10 * torch.log10(one.square().sum() / (one - other).square().sum())
        assert row["sqnr_db"] == pytest.approx(float(noise_db), abs=0.01)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_zeros_can_become_something(bits: int, tmp_path: Path) -> None:
    """A head for classes that are new begins with zeros; a step of 1 would round all that it learns to zero again."""
    module = mlp()
    with torch.no_grad():
        module[4].weight[5:] = 0.0  # type: ignore[operator]
    context = context_for(tiny_model(module), digits_data(), tmp_path)
    quantize(context, bits=bits, training=Training(epochs=3, lr=3e-3))
    weight = context.model.module.get_parameter("4.weight").detach()
    assert all(row.count_nonzero() > 8 for row in weight[5:])
    assert all((row < 0).any() and (row > 0).any() for row in weight[5:])


def test_the_same_seed_gives_the_same_bits(trained: dict[str, nn.Module], tmp_path: Path) -> None:
    contexts = [context_of(trained, "mobile", tmp_path / str(turn)) for turn in range(2)]
    details = [quantize(context) for context in contexts]
    assert details[0] == details[1]
    one, two = (context.model.module.state_dict() for context in contexts)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one.keys() == trained["mobile"].state_dict().keys()


def test_a_network_without_layers_for_it_says_why(tmp_path: Path) -> None:
    reason = QuantizeTechnique().applies(Qat(), tiny_model(nn.Sequential(nn.Embedding(4, 4), nn.Flatten())))
    assert reason is not None
    assert "there are none" in reason
