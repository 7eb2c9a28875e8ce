"""Folders of transformers with fewer layers: their config says so where it can, and what it says is what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.worker.loading.files import zipped
from worker.constraints import baked
from worker.loading import load_model
from worker.model import Model
from worker.structure.blocks import blocks, bypassed, kept_without, passed, same, varied
from worker.structure.depth import told
from worker.structure.dropping import dropped
from worker.structure.edits import apply
from worker.structure.restructured import restructured

SMALL: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 100}
T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "vocab_size": 100}
STAGES: dict[str, Any] = {"depths": [2, 3], "image_size": 32, "patch_size": 4}


def uploaded(folder: Path, network: Any) -> Model:
    network.save_pretrained(folder / "model")
    if "Image" in type(network).__name__:
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "model")
    path = folder / "model.zip"
    path.write_bytes(zipped({own.name: own.read_bytes() for own in (folder / "model").iterdir()}))
    return load_model(path, path.name, {}, folder)


def shorter(model: Model, *names: str) -> tuple[Model, dict[str, Any], bool]:
    """The model without these blocks, what was told of it, and whether it computes as if they gave what they take."""
    gone = [one for one in blocks(model).found if one.name in names]
    assert len(gone) == len(names)
    kept = kept_without(model.module, gone)
    edit = dropped(kept, told(model, kept))
    inputs = varied(model)
    with bypassed(gone):
        wanted = passed(model.module, inputs)
    module = baked(model.module)
    apply(module, [edit])
    made = restructured(model, module, [edit])
    return made, edit["config"], same(passed(made.module, inputs), wanted)


def test_types_of_layers_go_with_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(
        **SMALL, num_hidden_layers=4, num_key_value_heads=2, head_dim=8, sliding_window=4, layer_types=types
    )
    model = uploaded(tmp_path, transformers.Gemma3ForCausalLM(config))
    made, said, alike = shorter(model, "model.layers.0", "model.layers.2")
    assert said == {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    assert (made.native_as, alike) == (None, True)


def test_depths_of_stages_are_told_one_by_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], num_stages=2, **STAGES)
    model = uploaded(tmp_path, transformers.ConvNextForImageClassification(config))
    names = [one.name for one in blocks(model).found]
    assert names == [f"convnext.encoder.stages.{i}.layers.{j}" for i, depth in enumerate((2, 3)) for j in range(depth)]
    made, said, alike = shorter(model, names[1], names[2], names[4])
    assert said == {"depths": [1, 1]}
    assert (made.native_as, alike) == (None, True)


def test_where_layers_go_by_their_place_a_program_stands_in(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.SwinConfig(embed_dim=8, num_heads=[1, 2], window_size=2, **STAGES)
    model = uploaded(tmp_path, transformers.SwinForImageClassification(config))
    made, said, alike = shorter(model, "swin.encoder.layers.1.blocks.0")  # by turns windows are shifted
    assert said == {"depths": [2, 2]}
    assert (made.native_as, alike) == ("pt2", True)


def test_stacks_of_one_length_are_told_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(**T5, num_layers=3, num_decoder_layers=3, decoder_start_token_id=0)
    model = uploaded(tmp_path, transformers.T5ForSequenceClassification(config))
    alone = "which others of its kind lack and may read"
    kept = blocks(model).kept
    assert kept.keys() == {"transformer.encoder.block.0", "transformer.decoder.block.0"}
    assert all(alone in reason for reason in kept.values())
    made, said, alike = shorter(model, "transformer.decoder.block.1")
    assert said == {"num_decoder_layers": 2}
    assert (made.native_as, alike) == (None, True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_layers_that_move_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_hidden_layers=3, num_key_value_heads=2)
    network = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    network.model.layers[2].to(dtype)
    made, _, alike = shorter(uploaded(tmp_path, network), "model.layers.0")
    assert alike
    assert made.stored["model.layers.1.mlp.up_proj.weight"] == dtype
    assert made.stored["model.layers.0.mlp.up_proj.weight"] == torch.bfloat16


def test_a_layer_that_computes_again_and_again_is_none(tmp_path: Path) -> None:
    config = transformers.AlbertConfig(**SMALL, num_hidden_layers=3, embedding_size=16)
    told = blocks(uploaded(tmp_path, transformers.AlbertForSequenceClassification(config)))
    assert (told.found, set(told.kept.values())) == ([], {"it computes 3 times"})
