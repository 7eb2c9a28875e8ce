"""Networks of torch and transformers through both of torch's exporters, back as modules, and out again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from tests.worker.loading.onnx_files import run
from tests.worker.nets import Recurrent, bert
from worker.constraints import baked
from worker.export.onnx import export_onnx
from worker.loading import load_model
from worker.techniques.pruning.weights import prunable

PIXELS = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(32).reshape(2, 16)
MASK = torch.ones(2, 16, dtype=torch.int64)


class One(nn.Module):
    """A transformers model of one input."""

    def __init__(self, inner: nn.Module, name: str) -> None:
        super().__init__()
        self.inner = inner
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(**{self.name: x}).logits


class Two(nn.Module):
    """A transformers model of token ids and their mask."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.inner(input_ids=ids, attention_mask=mask).logits


def pictures(model: str, **config: object) -> nn.Module:
    import transformers

    made = getattr(transformers, f"{model}Config")(num_labels=7, **config)
    return One(getattr(transformers, f"{model}ForImageClassification")(made), "pixel_values")


def words(model: str, **config: object) -> nn.Module:
    import transformers

    made = getattr(transformers, f"{model}Config")(num_labels=7, vocab_size=50, pad_token_id=0, **config)
    return Two(getattr(transformers, f"{model}ForSequenceClassification")(made))


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "resnet": (lambda: pictures("ResNet", embedding_size=8, **STAGES), (PIXELS,)),
    "mobilenet": (lambda: pictures("MobileNetV2", depth_multiplier=0.35, image_size=64), (PIXELS,)),
    "efficientnet": (
        lambda: pictures("EfficientNet", width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320, image_size=64),
        (PIXELS,),
    ),
    "convnext": (lambda: pictures("ConvNext", image_size=64, **STAGES), (PIXELS,)),
    "vit": (lambda: pictures("ViT", image_size=64, patch_size=16, **SMALL), (PIXELS,)),
    "bert": (lambda: Two(bert().inner), (IDS, MASK)),
    "llama": (lambda: words("Llama", num_key_value_heads=1, **SMALL), (IDS, MASK)),
    "gpt2": (lambda: words("GPT2", n_embd=32, n_layer=2, n_head=2), (IDS, MASK)),
    "lstm": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), (IDS,)),
    "gru": (lambda: Recurrent(nn.GRU), (IDS,)),
}
QUICK = {("resnet", 14), ("bert", 20), ("lstm", 14), ("convnext", 11), ("gru", 20)}
LEGACY = (11, 14, 17)
# The older exporter has no attention before opset 14, and the newer one writes one for Llama that ONNX Runtime refuses.
IMPOSSIBLE = {*((name, 11) for name in ("vit", "bert", "llama", "gpt2")), ("llama", 23)}
CASES = [
    pytest.param(name, opset, marks=() if (name, opset) in QUICK else pytest.mark.slow)
    for name in NETWORKS
    for opset in (*LEGACY, 18, 20, 23)
    if (name, opset) not in IMPOSSIBLE
]


def write(network: nn.Module, inputs: tuple[Tensor, ...], opset: int, path: Path, *, open_steps: bool) -> None:
    names = [f"x{i}" for i in range(len(inputs))]
    open_axes = [(0, 1) if tensor.dtype == torch.int64 and open_steps else (0,) for tensor in inputs]
    common = {"opset_version": opset, "input_names": names, "output_names": ["y"]}
    if opset in LEGACY:
        axes = {name: {axis: f"{name}_{axis}" for axis in which} for name, which in zip(names, open_axes, strict=True)}
        torch.onnx.export(network, inputs, path, dynamo=False, dynamic_axes=axes, **common)
    else:
        shapes = tuple(dict.fromkeys(which, torch.export.Dim.DYNAMIC) for which in open_axes)
        torch.onnx.export(
            network, inputs, path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False, **common
        )


@pytest.mark.parametrize(("name", "opset"), CASES)
def test_a_network_comes_back_as_it_was(name: str, opset: int, tmp_path: Path) -> None:
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    network = make().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters announce each other
        open_steps = opset in LEGACY or name not in ("lstm", "gru")  # which the newer exporter unrolls
        write(network, inputs, opset, tmp_path / "m.onnx", open_steps=open_steps)
    model = load_model(tmp_path / "m.onnx", "m.onnx", {"task": "text-classification"}, tmp_path)
    assert model.facts.trainable, model.facts.untrainable_reason
    assert len(prunable(model.module)) == len(prunable(network))
    three = tuple(torch.cat((tensor, tensor[:1])) for tensor in inputs)
    if open_steps:
        three = tuple(tensor[:, :11] if tensor.dtype == torch.int64 else tensor for tensor in three)
    with torch.no_grad():
        expected = network(*three).numpy()
        np.testing.assert_allclose(model.module(*three).numpy(), expected, atol=1e-4 * max(1, np.abs(expected).max()))
        for parameter in model.module.parameters():
            parameter.mul_(1.01)
        changed = model.module(*three).numpy()
    feed = {facts.name: tensor.numpy() for facts, tensor in zip(model.facts.inputs, three, strict=True)}
    module = baked(model.module)
    for path in (model.save(module, tmp_path), export_onnx(module, model, tmp_path / "again.onnx")):
        np.testing.assert_allclose(run(onnx.load(path), feed), changed, atol=1e-4 * max(1, np.abs(changed).max()))
