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
from onnx import numpy_helper
from torch import Tensor, nn

from app.contract.distillation import Distill
from app.contract.pruning import Prune
from app.contract.qat import Qat
from app.contract.spec import Finetune
from app.contract.training import Training
from app.contract.weight_only import WeightOnly
from tests.worker.helpers import context_for, convnet, digits_data, mlp, tiny_model
from worker.constraints import baked, masks
from worker.context import Context
from worker.export.registry import Exported, write_onnx
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
    long = Training(epochs=15, lr=1e-3, schedule="cosine", distill=Distill())
    quantize(contexts[0], bits=2, group_size=None, symmetric=True, training=long)
    quantize(contexts[1], bits=2, group_size=None, symmetric=True, steps="fixed", training=long)
    rtn = WeightOnly(bits=2, group_size=None, symmetric=True, algorithm="rtn")
    QuantizeTechnique().apply(rtn, contexts[2])
    learned, fixed, rounded = (distance(context, trained["mlp"]) for context in contexts)
    assert learned < fixed < rounded, (learned, fixed, rounded)
    assert learned < 0.3 * rounded, (learned, fixed, rounded)


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
