"""Conversions of other people's files, on small random ones: against transformers' own module and against NumPy."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models.declared import reordered
from tests.models.references import wrong_words
from tests.models.whisper_file import read_variables, whisper_config, whisper_state

VOCABULARY, WIDTH, HEADS = 60, 8, 2
IDS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 1}


def small_whisper() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        num_mel_bins=4,
        max_source_positions=6,
        max_target_positions=10,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        **IDS,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    module = WhisperForConditionalGeneration(config)
    for name, parameter in module.named_parameters():
        if name.endswith(("bias", "norm.weight")):  # which start as zeros and ones
            torch.nn.init.normal_(parameter)
    return module.eval()


def variables(module: Any) -> dict[str, Tensor]:
    """The names and the stacking of CTranslate2, written down the other way round."""
    state = {name.removeprefix("model."): tensor for name, tensor in module.state_dict().items()}
    found = {"decoder/embeddings/weight": state["decoder.embed_tokens.weight"]}
    for conv in ("conv1", "conv2"):
        found |= {f"encoder/{conv}/{kind}": state[f"encoder.{conv}.{kind}"] for kind in ("weight", "bias")}
    for side, layers in (("encoder", 1), ("decoder", 2)):
        found[f"{side}/num_heads"] = torch.tensor(HEADS, dtype=torch.int16)
        found[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        norm(found, f"{side}/layer_norm", state, f"{side}.layer_norm")
        for i in range(layers):
            own, new = f"{side}/layer_{i}", f"{side}.layers.{i}"
            attention(found, f"{own}/self_attention", state, f"{new}.self_attn", ["qkv", "out"])
            if side == "decoder":
                attention(found, f"{own}/attention", state, f"{new}.encoder_attn", ["q", "kv", "out"])
            norm(found, f"{own}/ffn/layer_norm", state, f"{new}.final_layer_norm")
            for linear, name in (("linear_0", "fc1"), ("linear_1", "fc2")):
                found |= {f"{own}/ffn/{linear}/{kind}": state[f"{new}.{name}.{kind}"] for kind in ("weight", "bias")}
    return found


def norm(found: dict[str, Tensor], own: str, state: dict[str, Tensor], new: str) -> None:
    found |= {f"{own}/gamma": state[f"{new}.weight"], f"{own}/beta": state[f"{new}.bias"]}


def attention(found: dict[str, Tensor], own: str, state: dict[str, Tensor], new: str, parts: list[str]) -> None:
    norm(found, f"{own}/layer_norm", state, f"{new}_layer_norm")
    for i, part in enumerate(parts):
        names = ["out_proj"] if part == "out" else [f"{letter}_proj" for letter in part]
        for kind in ("weight", "bias"):
            stacked = [state.get(f"{new}.{name}.{kind}", torch.zeros(WIDTH)) for name in names]  # a key has no bias
            found[f"{own}/linear_{i}/{kind}"] = torch.cat(stacked)


def binary(content: dict[str, Tensor], version: int = 6) -> bytes:
    """A model.bin of float32 and int16 variables and one alias."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    made = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(content))
    for name, tensor in content.items():
        shape = struct.pack(f"<B{tensor.ndim}I", tensor.ndim, *tensor.shape)
        raw = tensor.detach().numpy().tobytes()
        made += text(name) + shape + struct.pack("<BI", 2 if tensor.dtype == torch.int16 else 0, len(raw)) + raw
    return made + struct.pack("<I", 1) + text("decoder/projection/weight") + text("decoder/embeddings/weight")


def test_a_whisper_of_ctranslate2_is_that_of_transformers(tmp_path: Path) -> None:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    module = small_whisper()
    (tmp_path / "model.bin").write_bytes(binary(variables(module)))
    read = read_variables(tmp_path / "model.bin")
    assert torch.equal(read["decoder/projection/weight"], read["decoder/embeddings/weight"])
    made = WhisperForConditionalGeneration(whisper_config(WhisperConfig, read, **IDS))
    missing, unexpected = made.load_state_dict(whisper_state(read), strict=False)
    assert (missing, unexpected) == (["proj_out.weight"], [])  # tied
    features, ids = torch.randn(2, 4, 12), torch.randint(0, VOCABULARY, (2, 5))
    with torch.no_grad():
        wanted = module(input_features=features, decoder_input_ids=ids).logits
        got = made.eval()(input_features=features, decoder_input_ids=ids).logits
    assert torch.equal(got, wanted)


def test_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(binary({}, version=5))
    with pytest.raises(ValueError, match="version 5"):
        read_variables(tmp_path / "model.bin")


def test_columns_follow_their_inputs() -> None:
    random = np.random.default_rng(0)
    inputs, weight = random.normal(size=(2, 3, 4, 5)), random.normal(size=(6, 60))
    wanted = inputs.transpose(0, 3, 2, 1).reshape(2, -1) @ weight.T  # axes turned round before they are flattened
    columns = reordered(torch.tensor(weight), of=(3, 4, 5), by=(2, 1, 0)).numpy()
    np.testing.assert_allclose(inputs.reshape(2, -1) @ columns.T, wanted)


def test_wrong_words_by_hand() -> None:
    assert wrong_words(["The cat, sat"], ["the cat sat"]) == 0
    assert wrong_words(["a x c", ""], ["a b c d", "e"]) == pytest.approx(3 / 5)
