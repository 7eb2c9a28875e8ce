"""Exported programs of transformers' own models: outputs exactly equal, trained, pruned, converted and saved again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.worker.loading.programs import exported, load, outputs
from worker.constraints import baked
from worker.evaluation.macs import module_macs
from worker.export.onnx import export_onnx
from worker.techniques.pruning.weights import WeightSet, prunable

TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "num_labels": 3,
}
# By name: the class, its config's arguments, and how its inputs are made.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ResNetForImageClassification": (
        "pixels",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic", "num_labels": 5},
    ),
    "MobileNetV2ForImageClassification": ("pixels", {"num_labels": 5, "depth_multiplier": 0.35}),
    "ConvNextForImageClassification": (
        "pixels",
        {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "num_labels": 5},
    ),
    "ViTForImageClassification": (
        "pixels",
        {key: TEXT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
        | {"image_size": 32, "patch_size": 8, "num_labels": 5},
    ),
    "BertForSequenceClassification": ("ids", TEXT),
    "LlamaForSequenceClassification": ("ids", TEXT | {"pad_token_id": 0, "use_cache": False}),
    "EfficientNetForImageClassification": (
        "pixels",
        {"width_coefficient": 0.25, "depth_coefficient": 0.25, "num_labels": 5, "hidden_dim": 320},
    ),
    "SwinForImageClassification": (
        "pixels",
        {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": 32, "patch_size": 2},
    ),
    "DistilBertForSequenceClassification": (
        "ids",
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 50, "num_labels": 3},
    ),
    "RobertaForSequenceClassification": ("ids", TEXT | {"pad_token_id": 1}),
    "DebertaV2ForSequenceClassification": ("ids", TEXT),
    "AlbertForSequenceClassification": ("ids", TEXT | {"embedding_size": 16}),
    "GPT2ForSequenceClassification": (
        "ids",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "num_labels": 3, "pad_token_id": 0}
        | {"use_cache": False},
    ),
    "Wav2Vec2ForSequenceClassification": (
        "waves",
        {key: TEXT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
        | {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
        | {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "num_labels": 3},
    ),
}
QUICK = (
    *("ResNetForImageClassification", "ViTForImageClassification"),
    *("BertForSequenceClassification", "LlamaForSequenceClassification"),
)
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MODELS]


def inputs_of(kind: str, batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    if kind == "pixels":
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}
    if kind == "waves":
        return {"input_values": torch.randn(batch, 800, generator=generator)}
    mask = torch.ones(batch, 12, dtype=torch.int64)
    mask[0, 9:] = 0
    return {"input_ids": torch.randint(1, 50, (batch, 12), generator=generator), "attention_mask": mask}


def net(name: str) -> tuple[Any, str, str]:
    import transformers

    kind, config = MODELS[name]
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    task = {"pixels": "image-classification", "waves": "audio-classification"}.get(kind, "text-classification")
    return cls(cls.config_class(**config)).eval(), kind, task


def program_of(module: Any, kind: str) -> bytes:
    axes = (0,) if kind == "pixels" else (0, 1)
    return exported(module, axes=axes, **inputs_of(kind, 2))


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_equal_before_and_after(tmp_path: Path, name: str) -> None:
    module, kind, task = net(name)
    model = load(program_of(module, kind), tmp_path / "in", task=task)
    again = model.save(baked(model.module), tmp_path)
    reloaded = load(again.read_bytes(), tmp_path / "again", task=task)
    program = torch.export.load(again).module()
    own = module.state_dict()
    state = model.module.state_dict()
    assert set(state) == set(own)
    assert all(torch.equal(state[key], own[key]) for key in own)
    for batch in (1, 2, 5):
        given = inputs_of(kind, batch)
        with torch.no_grad():
            expected = module(**given).logits
        assert torch.equal(outputs(model.module, *given.values()), expected)
        assert torch.equal(outputs(reloaded.module, *given.values()), expected)
        if batch > 1:  # torch's own guards hold the batch above one
            with torch.no_grad():
                assert torch.equal(program(**given)["logits"], expected)
    assert reloaded.facts == model.facts


def fit(forward: Callable[[], Tensor], module: nn.Module) -> float:
    """The loss of one step of Adam; no model here drops out of its own accord in eval-exported attention."""
    module.train()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    loss = functional.cross_entropy(forward(), torch.arange(5) % 3)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    module.eval()
    return loss.item()


@pytest.mark.parametrize("name", ["ResNetForImageClassification", "LlamaForSequenceClassification"])
def test_a_step_of_training_is_that_of_the_model(tmp_path: Path, name: str) -> None:
    module, kind, task = net(name)
    loaded = load(program_of(module, kind), tmp_path, task=task).module
    given = inputs_of(kind, 5)
    assert fit(lambda: loaded(*given.values()), loaded) == fit(lambda: module(**given).logits, module)
    own, state = module.state_dict(), loaded.state_dict()
    assert all(torch.equal(state[key], own[key]) for key in own)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("ResNetForImageClassification", None),
        ("BertForSequenceClassification", None),
        pytest.param("MobileNetV2ForImageClassification", None, marks=pytest.mark.slow),
        pytest.param("GPT2ForSequenceClassification", "transformer.h.0.attn.c_attn.weight", marks=pytest.mark.slow),
    ],
)
def test_pruned_and_converted(tmp_path: Path, name: str, weights: str | None) -> None:
    module, kind, task = net(name)
    model = load(program_of(module, kind), tmp_path / "in", task=task)
    found = prunable(model.module)
    assert {weight.name for weight in found} == {weight.name for weight in prunable(module)}
    assert weights is None or weights in {weight.name for weight in found}
    chosen = WeightSet(model.module, found)
    chosen.drop([value.abs() < value.abs().median() for value in chosen.values()])
    plain = baked(copy.deepcopy(model.module))
    given = tuple(inputs_of(kind, 3).values())
    assert torch.equal(outputs(plain, *given), outputs(model.module, *given))
    saved = load(model.save(plain, tmp_path).read_bytes(), tmp_path / "again", task=task).module
    assert torch.equal(outputs(saved, *given), outputs(plain, *given))
    zeros = sum(int((weight.value() == 0).sum()) for weight in prunable(saved))
    assert zeros == chosen.removed()
    path = export_onnx(plain, model, tmp_path / "model.onnx")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {tensor.name: value.numpy() for tensor, value in zip(model.facts.inputs, given, strict=True)}
    np.testing.assert_allclose(session.run(None, feed)[0], outputs(plain, *given).numpy(), atol=1e-4)
    assert module_macs(model.module, given) > 0
