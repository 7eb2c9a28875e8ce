"""Exported programs of hand-written modules: the same outputs, names, and training as the modules themselves."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.worker.loading.program_nets import MARKS, NETS, mlp, net, noise, train
from tests.worker.loading.programs import exported, load, outputs
from worker.constraints import baked, impose_mask
from worker.loading.program_module import Holder
from worker.model import Model
from worker.techniques.pruning.weights import prunable

pytestmark = MARKS


# Taken apart, these are hundreds of nodes, of kinds that the others have too.
LONG = pytest.mark.slow
FORMS = [
    pytest.param(name, form, marks=LONG if form and name in ("lstm", "gru", "encoder") else ())
    for name in NETS
    for form in (False, True)
]


@pytest.mark.parametrize(("name", "decompose"), FORMS)
def test_outputs_and_names_are_those_of_the_module(tmp_path: Path, name: str, decompose: bool) -> None:
    module, example, axes = net(name)
    content = exported(module, example[:2], axes=axes, decompose=decompose)
    model = load(content, tmp_path)
    program = torch.export.load(io.BytesIO(content)).module()
    for inputs in (example, example[:1], example.repeat(3, *[1] * (example.ndim - 1))):
        found, own = outputs(model.module, inputs), outputs(module, inputs)
        # Taken apart, a recurrent layer computes step by step.
        assert torch.allclose(found, own, atol=1e-6) if decompose else torch.equal(found, own)
        if len(inputs) > 1:  # torch's own guards hold the batch above one
            assert torch.equal(found, outputs(program, inputs))
    own, state = module.state_dict(), model.module.state_dict()
    assert set(state) == set(own)
    assert all(torch.equal(state[key], own[key]) for key in own)
    assert model.facts.parameters == sum(parameter.numel() for parameter in module.parameters())


def test_layers_are_those_of_torch_nn(tmp_path: Path) -> None:
    module, example, _ = net("convolutions")
    model = load(exported(module, example), tmp_path)
    kinds = {name: type(layer) for name, layer in model.module.named_modules() if name and type(layer) is not Holder}
    wanted = {name: type(layer) for name, layer in module.named_children() if name not in ("act", "block")}
    assert kinds == wanted | {"block.0": nn.Conv2d, "block.1": nn.BatchNorm2d}
    assert {layer.name: layer.type for layer in model.facts.layers} == {
        "stem": "Conv2d",
        "norm": "BatchNorm2d",
        "block.0": "Conv2d",
        "block.1": "BatchNorm2d",
        "head": "Linear",
    }
    assert model.facts.format == "pt2"
    assert model.facts.native_file == "model.pt2"
    assert model.facts.accepts == ("arrays", "images")
    assert [(t.name, t.shape, t.dtype) for t in model.facts.inputs] == [("x", (1, 8, 8), "float32")]


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ["convolutions", "mlp", "norms", "lstm", "tied"])
def test_training_is_that_of_the_module(tmp_path: Path, name: str, mode: str) -> None:
    """Losses, weights, running statistics and dropout, whatever mode the program was exported in."""
    module, example, axes = net(name)
    content = exported(copy.deepcopy(module).train(mode == "train"), example[:2], axes=axes)
    loaded = load(content, tmp_path).module
    assert torch.equal(outputs(loaded, example), outputs(module, example))
    classes = outputs(module, example).shape[1]
    assert train(loaded, example, classes) == train(module, example, classes)
    own, state = module.state_dict(), loaded.state_dict()
    assert all(torch.equal(state[key], own[key]) for key in own)
    assert torch.equal(outputs(loaded, example), outputs(module, example))


def test_attention_drops_out_in_training_alone(tmp_path: Path) -> None:
    module, example, axes = net("encoder")
    loaded = load(exported(copy.deepcopy(module).train(), example, axes=axes), tmp_path).module
    assert torch.equal(outputs(loaded, example), outputs(module, example))
    assert train(loaded, example, 4) == train(module, example, 4)
    assert torch.equal(outputs(loaded, example), outputs(module, example))


def test_instance_norm_keeps_statistics_in_training_alone(tmp_path: Path) -> None:
    module = nn.Sequential(nn.InstanceNorm1d(2, affine=True, track_running_stats=True), nn.Flatten(), nn.Linear(32, 3))
    content = exported(module.eval(), noise(2, 2, 16))
    loaded = load(content, tmp_path).module
    assert train(loaded, noise(6, 2, 16), 3) == train(module, noise(6, 2, 16), 3)
    assert torch.equal(loaded.get_submodule("0").running_var, module[0].running_var)
    assert torch.equal(outputs(loaded, noise(6, 2, 16)), outputs(module, noise(6, 2, 16)))


def test_a_cumulative_average_stays_one(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=None)).eval()
    loaded = load(exported(module, noise(2, 4)), tmp_path).module
    assert train(loaded, noise(6, 4), 3) == train(module, noise(6, 4), 3)
    assert torch.equal(loaded.get_submodule("1").running_mean, module[1].running_mean)


class Blocked(nn.Module):
    """A part without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.frozen(x)
        with torch.autocast("cpu", enabled=False):
            logits: Tensor = self.head(x)
        return logits


def test_blocks_are_laid_open_and_no_grad_is_kept(tmp_path: Path) -> None:
    module = Blocked().eval()
    loaded = load(exported(module, noise(2, 4)), tmp_path).module
    assert torch.equal(outputs(loaded, noise(3, 4)), outputs(module, noise(3, 4)))
    loaded(noise(3, 4)).sum().backward()
    assert loaded.get_submodule("frozen").weight.grad is None
    assert loaded.get_submodule("head").weight.grad is not None


# --- constraints and pruning ---------------------------------------------------------------------------------------


def test_copies_keep_masks_ties_and_what_is_not_persistent(tmp_path: Path) -> None:
    module, example, _ = net("tied")
    loaded = load(exported(module, example), tmp_path).module
    layers = dict(loaded.named_modules())
    assert layers["embedding"].weight is layers["output"].weight
    assert [weight.name for weight in prunable(loaded)] == ["embedding.weight", "block.weight"]
    mask = torch.rand(10, 8, generator=torch.Generator().manual_seed(0)) > 0.5
    impose_mask(loaded, "embedding.weight", mask)
    copied = copy.deepcopy(loaded)
    plain = baked(copied)
    assert torch.equal(outputs(plain, example), outputs(loaded, example))
    assert torch.equal(plain.get_submodule("output").weight, plain.get_submodule("embedding").weight * mask)
    assert plain.get_submodule("output").weight is plain.get_submodule("embedding").weight

    module, example, _ = net("convolutions")
    copied = copy.deepcopy(load(exported(module, example), tmp_path).module)
    assert set(copied.state_dict()) == set(module.state_dict())
    assert {name for name, _ in copied.named_buffers()} >= {"scale"}


class Functional(nn.Module):
    """Weights outside of any layer: one that a product takes as it is, one transposed, and one that is only added."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.first = nn.Parameter(noise(4, 6))
        self.inner.second = nn.Parameter(noise(3, 6))
        self.inner.shift = nn.Parameter(noise(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner.first @ self.inner.second.t() + self.inner.shift.sum(0)


def test_matrices_outside_of_layers_are_pruned(tmp_path: Path) -> None:
    module = Functional().eval()
    loaded = load(exported(module, noise(2, 4)), tmp_path).module
    holder = loaded.get_submodule("inner")
    assert isinstance(holder, Holder)
    assert [weight.name for weight in prunable(loaded)] == ["inner.first", "inner.second"]
    mask = noise(4, 6) > 0
    impose_mask(loaded, "inner.first", mask)
    with torch.no_grad():
        module.inner.first.mul_(mask)
    assert torch.equal(outputs(loaded, noise(3, 4)), outputs(module, noise(3, 4)))
    assert torch.equal(outputs(baked(loaded), noise(3, 4)), outputs(module, noise(3, 4)))
    module, example, axes = net("encoder")
    names = {weight.name for weight in prunable(load(exported(module, example, axes=axes), tmp_path).module)}
    assert "encoder.layers.0.self_attn.in_proj_weight" in names
    assert "encoder.layers.0.linear1.weight" in names
    assert "position" not in names


def test_an_export_frozen_for_inference_can_be_trained(tmp_path: Path) -> None:
    module = mlp().eval().requires_grad_(False)
    model: Model = load(exported(module, noise(2, 6)), tmp_path)
    assert all(parameter.requires_grad for parameter in model.module.parameters())


@pytest.mark.filterwarnings("ignore:No complete tensor found")  # torch's word on such weights
def test_views_of_one_storage_are_tensors_of_their_own(tmp_path: Path) -> None:
    """Weights that are slices of one flat tensor, and one that is stored transposed."""
    module = mlp().eval()
    flat = noise(48 + 8)
    module[0].weight = nn.Parameter(flat[:48].view(6, 8).t())
    module[0].bias = nn.Parameter(flat[48:])
    buffer = io.BytesIO(exported(module, noise(2, 6)))
    loaded = load(buffer.getvalue(), tmp_path).module
    assert torch.equal(outputs(loaded, noise(3, 6)), outputs(module, noise(3, 6)))
    assert loaded.get_submodule("0").weight.untyped_storage().nbytes() == 48 * 4
