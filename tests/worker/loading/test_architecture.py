"""Declarative architectures against the same networks written by hand: equal outputs, before and after save."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from app.contract.errors import DatasetMismatch, ModelRejected
from tests.worker.loading.files import linear_file, linear_spec
from worker.data.base import RawBatch
from worker.demo.train_lenet import SPEC as LENET_SPEC
from worker.demo.train_lenet import lenet
from worker.loading import load_model
from worker.model import Model


class Block(nn.Module):
    """A residual block with a projection, as anybody would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.shortcut = nn.Sequential(nn.Conv2d(4, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.shortcut(x)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 4, 1)), nn.Sequential(nn.Conv2d(3, 2, 3, padding=1))])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branches[0](x), self.branches[1](x)], dim=1)


class Last(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        outputs = super().forward(x)[0]
        half = self.hidden_size  # the backward direction ends at the first step
        return torch.cat((outputs[:, -1, :half], outputs[:, 0, half:]), dim=1)


class Steps(nn.GRU):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


def residual() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def parallel() -> nn.Module:
    return nn.Sequential(Branches(), nn.Sequential(nn.GELU(), nn.MaxPool2d(2)), nn.Flatten(), nn.Linear(6 * 9, 3))


def lstm() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(50, 8, padding_idx=0),
        Steps(8, 6, batch_first=True),
        Last(6, 5, num_layers=2, bidirectional=True, batch_first=True),
        nn.Linear(10, 2),
    )


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True, norm_first=True)
    return nn.Sequential(nn.Embedding(50, 8), layer, nn.LayerNorm(8), nn.Flatten(), nn.Linear(8 * 12, 4))


def conv(inputs: int, outputs: int, kernel: int, **more: Any) -> dict[str, Any]:
    return {"type": "Conv2d", "in_channels": inputs, "out_channels": outputs, "kernel_size": kernel} | more


def linear(inputs: int, outputs: int) -> dict[str, Any]:
    return {"type": "Linear", "in_features": inputs, "out_features": outputs}


def embedding(**more: Any) -> dict[str, Any]:
    return {"type": "Embedding", "num_embeddings": 50, "embedding_dim": 8} | more


IMAGE = {"task": "image-classification", "input": {"shape": [3, 6, 6], "dtype": "float32"}}
TOKENS = {"task": "text-classification", "input": {"shape": [12], "dtype": "int64"}}
RESIDUAL = [
    conv(3, 4, 3),
    {"type": "ReLU", "inplace": True},
    {
        "type": "Residual",
        "layers": [
            conv(4, 8, 3, padding=1, bias=False),
            {"type": "BatchNorm2d", "num_features": 8},
            {"type": "ReLU", "inplace": True},
        ],
        "shortcut": [conv(4, 8, 1)],
    },
    {"type": "AdaptiveAvgPool2d", "output_size": 1},
    {"type": "Flatten"},
    linear(8, 5),
]
PARALLEL = [
    {"type": "Parallel", "branches": [[conv(3, 4, 1)], [conv(3, 2, 3, padding=1)]]},
    {"type": "Sequential", "layers": [{"type": "GELU"}, {"type": "MaxPool2d", "kernel_size": 2}]},
    {"type": "Flatten"},
    linear(54, 3),
]
LSTM = [
    embedding(padding_idx=0),
    {"type": "GRU", "input_size": 8, "hidden_size": 6},
    {"type": "LSTM", "input_size": 6, "hidden_size": 5, "num_layers": 2, "bidirectional": True, "output": "last"},
    linear(10, 2),
]
TRANSFORMER = [
    embedding(),
    {
        "type": "TransformerEncoderLayer",
        "d_model": 8,
        "nhead": 2,
        "dim_feedforward": 16,
        "activation": "gelu",
        "norm_first": True,
    },
    {"type": "LayerNorm", "normalized_shape": 8},
    {"type": "Flatten"},
    linear(96, 4),
]

CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "lenet": (lenet, LENET_SPEC),
    "residual": (residual, IMAGE | {"architecture": {"layers": RESIDUAL}}),
    "parallel": (parallel, IMAGE | {"architecture": {"layers": PARALLEL}}),
    "lstm": (lstm, TOKENS | {"architecture": {"layers": LSTM}}),
    "transformer": (transformer, TOKENS | {"architecture": {"layers": TRANSFORMER}}),
}


def by_hand(make: Callable[[], nn.Module]) -> nn.Module:
    """The network with random weights and non-trivial running statistics."""
    torch.manual_seed(1)
    module = make()
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + 0.5)
        else:
            assert name.endswith("num_batches_tracked")
    return module.eval()


def samples(spec: dict[str, Any]) -> Tensor:
    shape = (4, *spec["input"]["shape"])
    generator = torch.Generator().manual_seed(2)
    if spec["input"].get("dtype") == "int64":
        return torch.randint(0, 50, shape, generator=generator)
    return torch.randn(shape, generator=generator)


def reload(model: Model, spec: dict[str, Any], folder: Path) -> Model:
    output = folder / "output"
    output.mkdir()
    path = model.save(model.module, output)
    return load_model(path, path.name, spec, folder)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("container", ["model.safetensors", "model.pt", "wrapped.pt", "legacy.pt"])
def test_outputs_are_equal_after_load_and_after_save(tmp_path: Path, name: str, container: str) -> None:
    make, spec = CASES[name]
    hand = by_hand(make)
    path = tmp_path / container
    match container:
        case "model.safetensors":
            save_file(hand.state_dict(), path, metadata={"origin": "test"})
        case "wrapped.pt":
            torch.save({"state_dict": hand.state_dict(), "epoch": 3}, path)
        case _:
            torch.save(hand.state_dict(), path, _use_new_zipfile_serialization=container == "model.pt")
    model = load_model(path, container, spec, tmp_path)
    inputs = samples(spec)
    with torch.no_grad():
        expected = hand(inputs)
        torch.testing.assert_close(model.module(inputs), expected, rtol=0, atol=1e-6)
        again = reload(model, spec, tmp_path)
        assert torch.equal(again.module(inputs), model.module(inputs))
    assert list(again.module.state_dict()) == list(hand.state_dict())
    assert model.facts.classes == expected.shape[1]
    assert model.facts.parameters == sum(parameter.numel() for parameter in hand.parameters())
    assert again.facts == model.facts


def test_saving_keeps_names_metadata_and_dtype(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    state = {name: tensor.half() for name, tensor in lenet().state_dict().items()}
    save_file(state, path, metadata={"epoch": "7"})
    model = load_model(path, path.name, LENET_SPEC, tmp_path)
    assert {tensor.dtype for tensor in model.module.state_dict().values()} == {torch.float32}
    output = tmp_path / "output"
    output.mkdir()
    written = model.save(model.module, output)
    with safe_open(str(written), framework="pt") as file:
        assert file.metadata() == {"epoch": "7"}
    saved = load_file(written)
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in state)


def test_a_checkpoint_without_batch_counts_loads(tmp_path: Path) -> None:
    hand = by_hand(residual)
    state = {name: value for name, value in hand.state_dict().items() if not name.endswith("tracked")}
    path = tmp_path / "m.safetensors"
    save_file(state, path)
    model = load_model(path, path.name, CASES["residual"][1], tmp_path)
    output = tmp_path / "output"
    output.mkdir()
    assert load_file(model.save(model.module, output)).keys() == state.keys()


def test_facts_name_layers_as_the_state_dict_does(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(by_hand(residual).state_dict(), path)
    facts = load_model(path, path.name, CASES["residual"][1], tmp_path).facts
    assert [(layer.name, layer.type, layer.shape, layer.parameters) for layer in facts.layers] == [
        ("0", "Conv2d", (4, 3, 3, 3), 112),
        ("2.layers.0", "Conv2d", (8, 4, 3, 3), 288),
        ("2.layers.1", "BatchNorm2d", (8,), 16),
        ("2.shortcut.0", "Conv2d", (8, 4, 1, 1), 40),
        ("5", "Linear", (5, 8), 45),
    ]
    assert facts.accepts == ("arrays", "images")


def test_recurrent_weights_are_facts(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    hand = by_hand(lstm)
    save_file(hand.state_dict(), path)
    facts = load_model(path, path.name, CASES["lstm"][1], tmp_path).facts
    assert facts.layers[1].name == "1.weight_ih_l0"
    assert sum(layer.parameters for layer in facts.layers) == facts.parameters
    assert facts.accepts == ("arrays",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"0.weight": torch.zeros(2, 5)}, r"'0.weight' has the shape \[2, 5\].*expects \[2, 4\]"),
        ({"fc.weight": torch.zeros(2, 4)}, "unexpected 'fc.weight'"),
        ({"0.bias": torch.tensor([0.0, float("nan")])}, "'0.bias' holds 1 NaN"),
        ({"0.bias": torch.tensor([0.0, float("inf")])}, "'0.bias' holds 1 NaN or infinite"),
        ({"0.weight": torch.zeros(2, 4, dtype=torch.int8)}, "'0.weight' is int8"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, change: dict[str, Tensor], words: str) -> None:
    path = linear_file(tmp_path / "m.safetensors", **change)
    with pytest.raises(ModelRejected, match=words):
        load_model(path, path.name, linear_spec(), tmp_path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"0.weight": torch.zeros(2, 4)}, path)
    with pytest.raises(ModelRejected, match=r"lacks '0\.bias'"):
        load_model(path, path.name, linear_spec(), tmp_path)


LINEAR = linear(4, 2)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (linear_spec(labels=["a", "b", "c"]), "2 outputs and the spec names 3 labels"),
        (linear_spec(input={"shape": [5]}), r"layer '0' \(Linear\) fails on an input of shape \[2, 5\]"),
        (linear_spec(input={"shape": [3, 4]}), r"shape \[2, 3, 2\]"),
        (linear_spec(architecture={"layers": [LINEAR, {"type": "Flatten", "start_dim": 0}]}), r"shape \[4\]"),
        (
            linear_spec(architecture={"layers": [{"type": "GroupNorm", "num_groups": 3, "num_channels": 4}]}),
            "divisible",
        ),
        (
            linear_spec(architecture={"layers": [conv(1, 65536, 1)]}, input={"shape": [1, 256, 256]}),
            "takes 34359738368 bytes",
        ),
        (linear_spec(architecture={"layers": [conv(65536, 65536, 65536)]}), "cannot be built"),
        (linear_spec(architecture={"layers": [{"type": "LSTM", "input_size": 4, "hidden_size": 2}]}), "batch, steps"),
        (
            linear_spec(
                architecture={"layers": [{"type": "GRU", "input_size": 3, "hidden_size": 2, "output": "last"}]},
                input={"shape": [5, 4]},
            ),
            r"'0' \(GRU\).*4",
        ),
    ],
)
def test_layers_that_do_not_work_are_named(tmp_path: Path, spec: dict[str, Any], words: str) -> None:
    path = linear_file(tmp_path / "m.safetensors")
    with pytest.raises(ModelRejected, match=words):
        load_model(path, path.name, spec, tmp_path)


def test_a_small_storage_does_not_pose_as_a_large_tensor(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"0.weight": torch.zeros(1).expand(65536, 65536), "0.bias": torch.zeros(65536)}, path)
    spec = linear_spec(architecture={"layers": [linear(65536, 65536)]}, input={"shape": [65536]})
    with pytest.raises(ModelRejected, match="larger than the file"):
        load_model(path, path.name, spec, tmp_path)


class TestEncoding:
    """Raw samples become inputs."""

    @pytest.fixture
    def model(self, tmp_path: Path) -> Model:
        path = tmp_path / "m.safetensors"
        save_file(by_hand(residual).state_dict(), path)
        return load_model(path, path.name, CASES["residual"][1], tmp_path)

    def test_pictures_are_divided_by_255_in_the_models_channels(self, model: Model) -> None:
        picture = Image.new("RGB", (6, 6), (255, 51, 0))
        picture.putpixel((5, 0), (0, 0, 102))
        (inputs,) = model.encode(RawBatch([picture, Image.new("L", (6, 6), 51)], None))
        assert inputs.shape == (2, 3, 6, 6)
        assert inputs.dtype == torch.float32
        assert inputs[0, :, 1, 1].tolist() == pytest.approx([1.0, 0.2, 0.0])
        assert inputs[0, :, 0, 5].tolist() == pytest.approx([0.0, 0.0, 0.4])
        assert inputs[1].unique().tolist() == pytest.approx([0.2])

    def test_pictures_of_another_size_are_refused(self, model: Model) -> None:
        with pytest.raises(DatasetMismatch, match=r"7 x 6 pixels .* takes 6 x 6"):
            model.encode(RawBatch([Image.new("RGB", (6, 7))], None))

    def test_arrays_become_the_models_dtype(self, model: Model) -> None:
        (inputs,) = model.encode(RawBatch({"input": torch.ones(2, 3, 6, 6, dtype=torch.float64)}, None))
        assert inputs.dtype == torch.float32

    def test_text_is_refused(self, model: Model) -> None:
        with pytest.raises(DatasetMismatch, match="arrays"):
            model.encode(RawBatch(["words"], None))

    def test_unknown_token_ids_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "m.safetensors"
        save_file(by_hand(lstm).state_dict(), path)
        model = load_model(path, path.name, CASES["lstm"][1], tmp_path)
        with pytest.raises(DatasetMismatch, match=r"from 0 to 50; .* knows 0 to 49"):
            model.encode(RawBatch({"input": torch.tensor([[0] * 11 + [50]])}, None))


def test_a_header_length_that_looks_like_a_pickle_is_safetensors(tmp_path: Path) -> None:
    path = linear_file(tmp_path / "m.safetensors")
    body = path.read_bytes()
    (length,) = struct.unpack("<Q", body[:8])
    padded = body[8 : 8 + length].ljust(0x280)  # 0x80 0x02 is how a pickle starts
    path.write_bytes(struct.pack("<Q", 0x280) + padded + body[8 + length :])
    assert load_model(path, path.name, linear_spec(), tmp_path).facts.classes == 2
