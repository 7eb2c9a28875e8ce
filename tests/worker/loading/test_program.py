"""Exported programs of hand-written modules: the same outputs, names, training and files as the modules themselves."""

from __future__ import annotations

import copy
import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from app.contract.errors import DatasetMismatch, ExportFailed, ModelRejected
from tests.worker.loading.programs import ConvNet, exported, image, load, outputs, saved
from tests.worker.nets import Recurrent
from worker.constraints import baked, impose_mask
from worker.data.base import RawBatch
from worker.loading.program_module import Holder, Program
from worker.model import Model
from worker.techniques.pruning.weights import prunable

pytestmark = [
    pytest.mark.filterwarnings("ignore:The tensor attributes"),  # torch's word on exporting recurrent layers
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # torch's own, in run_decompositions
]


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    """Without the fused kernel of nn.MultiheadAttention, which no export has and which rounds differently."""
    was_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(was_fast)


class Encoder(nn.Module):
    """A transformer encoder over token ids, with its weights in nn.MultiheadAttention and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 16, padding_idx=0)
        self.position = nn.Parameter(torch.randn(1, 32, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.position[:, : ids.shape[1]]
        logits: Tensor = self.head(self.encoder(x).mean(1))
        return logits


class Norms(nn.Module):
    """Layers of many kinds, for [batch, 2, 16]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(2, 8, 3, padding="same", dilation=2)
        self.up = nn.ConvTranspose1d(8, 8, 2, stride=2, output_padding=1, dilation=2)
        self.batch = nn.BatchNorm1d(8, affine=False)
        self.instance = nn.InstanceNorm1d(8, affine=True)
        self.group = nn.GroupNorm(2, 8)
        self.channels = nn.Dropout1d(0.1)
        self.prelu = nn.PReLU(8)
        self.layer = nn.LayerNorm(8, bias=False)
        self.rms = nn.RMSNorm(8)
        self.alpha = nn.AlphaDropout(0.1)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.group(self.instance(self.batch(self.up(self.conv(x)))))
        x = self.rms(self.layer(self.prelu(self.channels(x)).transpose(1, 2)))
        x = self.alpha(self.normed(self.cross(x, x, x, need_weights=False)[0]))
        logits: Tensor = self.head(x.mean(1))
        return logits


class Tied(nn.Module):
    """The output layer has the embedding's weight, and the same block runs twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 8)
        self.block = nn.Linear(8, 8)
        self.output = nn.Linear(8, 10, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.block(torch.relu(self.block(self.embedding(ids)))).mean(1)
        logits: Tensor = self.output(x)
        return logits


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 3))


def token_ids(batch: int = 3, length: int = 8, vocabulary: int = 10) -> Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# The module, inputs with a batch of 3, and the axes that vary.
NETS: dict[str, tuple[Callable[[], nn.Module], Tensor, tuple[int, ...]]] = {
    "convolutions": (ConvNet, image(3), (0,)),
    "mlp": (mlp, noise(3, 6), (0,)),
    "encoder": (Encoder, token_ids(), (0, 1)),
    "norms": (Norms, noise(3, 2, 16), (0,)),
    "tied": (Tied, token_ids(), (0,)),
    "lstm": (
        lambda: Recurrent(nn.LSTM, num_layers=2, dropout=0.2, bidirectional=True, proj_size=0),
        token_ids(),
        (0,),
    ),
    "gru": (lambda: Recurrent(nn.GRU), token_ids(), (0,)),
    "rnn": (lambda: Recurrent(nn.RNN, nonlinearity="relu"), token_ids(), (0,)),
}


def net(name: str) -> tuple[nn.Module, Tensor, tuple[int, ...]]:
    make, example, axes = NETS[name]
    torch.manual_seed(0)
    return make().eval(), example, axes


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


def train(module: nn.Module, inputs: Tensor, classes: int) -> list[float]:
    """Losses of three steps, with the dropout of one seed."""
    targets = torch.arange(len(inputs)) % classes
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module.train()
    torch.manual_seed(1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = functional.cross_entropy(module(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    module.eval()
    return losses


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


# --- saved again ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convolutions", "encoder", "norms", "tied", "lstm"])
def test_saved_programs_load_in_plain_torch_and_here(tmp_path: Path, name: str) -> None:
    module, example, axes = net(name)
    model = load(exported(module, example, axes=axes), tmp_path / "in")
    again = model.save(baked(model.module), tmp_path)
    assert again.name == "model.pt2"
    program = torch.export.load(again)
    larger = example.repeat(3, *[1] * (example.ndim - 1))
    assert torch.equal(outputs(program.module(), larger), outputs(module, larger))
    assert set(program.state_dict) == set(module.state_dict())
    reloaded = load(again.read_bytes(), tmp_path / "again")
    assert reloaded.facts == model.facts
    assert torch.equal(outputs(reloaded.module, larger), outputs(module, larger))
    assert train(reloaded.module, example, 3) == train(model.module, example, 3)


def test_a_saved_program_holds_no_pickle_and_no_path(tmp_path: Path) -> None:
    module, example, _ = net("convolutions")
    content = exported(module, example)
    model = load(content, tmp_path / "in")
    again = model.save(model.module, tmp_path)
    with zipfile.ZipFile(again) as archive:
        sizes = {info.filename.partition("/")[2]: info.file_size for info in archive.infolist()}
        text = archive.read("model/models/model.json").decode()
    assert sizes["data/sample_inputs/model.pt"] == 0
    assert "stack_trace" not in text
    assert str(Path(__file__).parents[3]) not in text
    assert again.stat().st_size < len(content)
    (tmp_path / "second").mkdir()
    assert model.save(model.module, tmp_path / "second").read_bytes() == again.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32_and_is_stored_as_it_came(tmp_path: Path, dtype: torch.dtype) -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.net(x.to(dtype)) + torch.ones(3, dtype=dtype)
            return logits

    module = Casting().to(dtype).eval()
    model = load(exported(module, noise(2, 6).to(dtype)), tmp_path / "in")
    assert model.facts.inputs[0].dtype == "float32"
    assert {tensor.dtype for tensor in model.module.parameters()} == {torch.float32}
    exact = copy.deepcopy(module).float()
    exact.forward = lambda x: exact.net(x) + 1  # type: ignore[method-assign]
    assert torch.allclose(outputs(model.module, noise(5, 6)), outputs(exact, noise(5, 6)), atol=1e-6)
    again = model.save(model.round_as_stored(baked(model.module)), tmp_path)
    program = torch.export.load(again)
    assert {tensor.dtype for tensor in program.state_dict.values()} == {dtype, torch.int64}
    half = noise(5, 6).to(dtype)
    assert torch.equal(outputs(program.module(), half), outputs(module, half))
    assert torch.equal(outputs(load(again.read_bytes(), tmp_path / "again").module, half), outputs(model.module, half))


class Wrapped(nn.Module):
    """Gives its logits in the way that `form` says."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 3)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.head(x), x * 2)


@pytest.mark.parametrize(
    ("form", "take"),
    [
        (lambda y, h: (y,), lambda found: found[0]),
        (lambda y, h: [y], lambda found: found[0]),
        (lambda y, h: {"score": y}, lambda found: found["score"]),
        (lambda y, h: {"hidden": [h, (h,)], "logits": y}, lambda found: found["logits"]),
    ],
)
def test_logits_come_back_as_they_came(
    tmp_path: Path, form: Callable[[Tensor, Tensor], Any], take: Callable[[Any], Tensor]
) -> None:
    module = Wrapped(form).eval()
    model = load(exported(module, noise(2, 4)), tmp_path / "in")
    expected = take(module(noise(3, 4)))
    assert torch.equal(model.module(noise(3, 4)), expected)
    found = torch.export.load(model.save(model.module, tmp_path)).module()(noise(3, 4))
    assert torch.equal(take(found), expected)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(10, 4)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor, features: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.cat([self.words(ids).mean(1), features], dim=1))
        return logits


def test_several_inputs_by_name(tmp_path: Path) -> None:
    module = TwoInputs().eval()
    content = exported(module, features=noise(2, 2), ids=token_ids(2, 5))
    model = load(content, tmp_path / "in", task="text-classification")
    assert [tensor.name for tensor in model.facts.inputs] == ["features", "ids"]
    raw = RawBatch({"ids": token_ids(3, 5).to(torch.int32), "features": noise(3, 2)}, None)
    expected = outputs(lambda *_: module(token_ids(3, 5), noise(3, 2)))
    assert torch.equal(outputs(model.module, *model.encode(raw)), expected)
    with pytest.raises(DatasetMismatch, match="ids from 0 to 99; the model's embedding knows 0 to 9"):
        model.encode(RawBatch({"ids": torch.tensor([[0, 99]]), "features": noise(1, 2)}, None))
    program = torch.export.load(model.save(model.module, tmp_path)).module()
    assert torch.equal(program(ids=token_ids(3, 5), features=noise(3, 2)), expected)


def test_pictures_are_scaled(tmp_path: Path) -> None:
    model = load(exported(ConvNet().eval(), image()), tmp_path)
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    (encoded,) = model.encode(RawBatch([Image.fromarray(pixels)], None))
    np.testing.assert_allclose(encoded.numpy(), pixels[None, None] / 255, rtol=1e-6)
    with pytest.raises(DatasetMismatch, match="takes arrays"):
        model.encode(RawBatch(["text"], None))


def test_the_example_is_long_enough(tmp_path: Path) -> None:
    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(1, 4, 40, stride=5), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.second(self.first(x.unsqueeze(1)).mean(-1))
            return logits

    module = Waves().eval()
    content = exported(module, noise(2, 60), axes=(0, 1))
    model = load(content, tmp_path, task="audio-classification")
    assert model.example_length == 120  # half of 60 would be shorter than the kernel
    assert model.example(2)[0].shape == (2, 120)
    assert torch.equal(outputs(model.module, noise(3, 400)), outputs(module, noise(3, 400)))


def test_what_cannot_be_traced_again_is_an_export_that_failed(tmp_path: Path) -> None:
    model = load(exported(ConvNet().eval(), image()), tmp_path)
    assert isinstance(model.module, Program)
    fixed = copy.deepcopy(model.module)
    fixed.add_module("head", nn.Sequential(nn.Flatten(0), nn.Linear(2 * 8 * 16, 20), nn.Unflatten(0, (2, 10))))
    with pytest.raises(ExportFailed, match="could not export the program again"):
        model.save(fixed.eval(), tmp_path)


# --- refusals ------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        logits: Tensor = self.head(x)
        return logits


class Spoiling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x[:, :4].mul_(2))
        return logits


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits: Tensor = self.head(x)
        return logits.float()


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x + torch.rand_like(x))
        return logits


def static() -> bytes:
    return saved(torch.export.export(mlp().eval(), (noise(2, 6),)))


def with_flag() -> bytes:
    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor, scale: float) -> Tensor:
            logits: Tensor = self.head(x) * scale
            return logits

    shapes = ({0: torch.export.Dim.DYNAMIC}, None)
    return saved(torch.export.export(Flagged().eval(), (noise(2, 4), 2.0), dynamic_shapes=shapes))


def poisoned() -> nn.Module:
    module = mlp().eval()
    with torch.no_grad():
        module[0].weight[0, 0] = float("nan")
    return module


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "fixed batch": (static, r"fixed batch \(2\)(.|\n)*torch\.export\.Dim\.DYNAMIC(.|\n)*torch\.export\.save"),
    "a number as input": (with_flag, "an argument that is no tensor"),
    "counts its calls": (lambda: exported(Counting().eval(), noise(2, 4)), "changes 'calls' whenever it runs"),
    "changes its input": (lambda: exported(Spoiling().eval(), noise(2, 4)), "changes 'x' whenever it runs"),
    "autocast": (lambda: exported(Autocast().eval(), noise(2, 4)), "under torch.autocast"),
    "random numbers": (lambda: exported(Noisy().eval(), noise(2, 4)), "draws random numbers"),
    "float64": (lambda: exported(mlp().double().eval(), noise(2, 6).double()), r"model\.float\(\)"),
    "NaN": (lambda: exported(poisoned(), noise(2, 6)), "'0.weight' holds 1 NaN"),
    "no logits": (
        lambda: exported(nn.Sequential(nn.Conv2d(1, 2, 3)).eval(), noise(2, 1, 8, 8)),
        r"gives an output of shape \[2, 2, 6, 6\]",
    ),
    "two results": (
        lambda: exported(Wrapped(lambda y, h: (y, h)).eval(), noise(2, 4)),
        "gives 2 tensors .* dictionary with the key 'logits'",
    ),
    "dictionary without logits": (
        lambda: exported(Wrapped(lambda y, h: {"a": y, "b": h}).eval(), noise(2, 4)),
        "key 'logits'",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_say_what_to_do(tmp_path: Path, kind: str) -> None:
    make, words = REFUSED[kind]
    with pytest.raises(ModelRejected, match=words):
        load(make(), tmp_path)


def test_the_spec_has_to_fit(tmp_path: Path) -> None:
    content = exported(mlp().eval(), noise(2, 6))
    layers = {"layers": [{"type": "Linear", "in_features": 6, "out_features": 3}]}
    for spec, pointer, words in (
        ({"task": None}, "/task", "give spec.task"),
        ({"labels": ["a", "b"]}, "/labels", "3 outputs and the spec names 2 labels"),
        ({"architecture": layers, "input": {"shape": [6]}}, "/architecture", "brings its own layers"),
        ({"task": "masked-lm"}, "/task", "needs its tokenizer"),
    ):
        with pytest.raises(ModelRejected, match=words) as caught:
            load(content, tmp_path, **spec)
        assert caught.value.pointer == pointer
    assert load(content, tmp_path, labels=["a", "b", "c"]).facts.labels == ("a", "b", "c")
    assert load(content, tmp_path, task="regression").facts.classes == 3


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
