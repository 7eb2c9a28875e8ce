"""Whisper in CTranslate2's file as a Hugging Face folder.

The binary format, little-endian: version uint32; name of the specification; its revision uint32; the number of
variables uint32, and for each its name, rank uint8, dimensions uint32, type uint8, size in bytes uint32 and content;
then the number of aliases uint32 and pairs of names. A string is its length with the closing zero, uint16, and its
bytes. CTranslate2 stacks the projections of self-attention (query, key, value) and of cross-attention (key, value).
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VERSION = 6
END, START = 50256, 50257  # of a text, of a transcript: ids of the English vocabulary
# The library's numbers of its types.
DTYPES = {
    0: torch.float32,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.float16,
    5: torch.bfloat16,
}
# Where a projection of an attention lies in the file: own name of the layer, and which part of its rows.
SELF = {"q_proj": ("linear_0", 0, 3), "k_proj": ("linear_0", 1, 3), "v_proj": ("linear_0", 2, 3)}
CROSS = {"q_proj": ("linear_0", 0, 1), "k_proj": ("linear_1", 0, 2), "v_proj": ("linear_1", 1, 2)}


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.content = content
        self.at = 0

    def number(self, form: str) -> int:
        (value,) = struct.unpack_from(f"<{form}", self.content, self.at)
        self.at += struct.calcsize(form)
        return int(value)

    def raw(self, size: int) -> bytes:
        self.at += size
        return self.content[self.at - size : self.at]

    def text(self) -> str:
        return self.raw(self.number("H"))[:-1].decode()


def read_variables(path: Path) -> dict[str, Tensor]:
    """Every variable of a `model.bin` by its name, and under its aliases. Raises ValueError for another version."""
    reader = _Reader(path.read_bytes())
    if (version := reader.number("I")) != VERSION:
        raise ValueError(f"{path.name} has the version {version}; {VERSION} is read")
    reader.text(), reader.number("I")
    found = {}
    for _ in range(reader.number("I")):
        name = reader.text()
        shape = [reader.number("I") for _ in range(reader.number("B"))]
        dtype = DTYPES[reader.number("B")]
        content = reader.raw(reader.number("I"))
        found[name] = torch.frombuffer(bytearray(content), dtype=dtype).reshape(shape)
    for _ in range(reader.number("I")):
        alias = reader.text()
        found[alias] = found[reader.text()]
    return found


def whisper_state(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of transformers' Whisper, as float32."""
    state = dict(_whisper(variables))
    return {f"model.{name}": tensor.to(torch.float32).contiguous() for name, tensor in state.items()}


def write_whisper_folder(source: Path, folder: Path) -> Path:
    """Writes the Hugging Face folder of a CTranslate2 Whisper in English; returns `folder`."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    variables = read_variables(source / "model.bin")
    state = whisper_state(variables)
    folder.mkdir(parents=True)
    config = whisper_config(WhisperConfig, variables)
    config.architectures = [WhisperForConditionalGeneration.__name__]
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)
    shutil.copy(source / "tokenizer.json", folder)
    end = "<|endoftext|>"
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": end, "eos_token": end, "bos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def whisper_config(kind: type, variables: dict[str, Tensor], **ids: int) -> Any:
    """The sizes of a model, read off its variables; `ids` in place of those of the English vocabulary."""
    vocabulary, width = variables["decoder/embeddings/weight"].shape
    return kind(
        vocab_size=vocabulary,
        d_model=width,
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        max_source_positions=len(variables["encoder/position_encodings/encodings"]),
        max_target_positions=len(variables["decoder/position_encodings/encodings"]),
        **{f"{side}_layers": _layers(variables, side) for side in ("encoder", "decoder")},
        **{f"{side}_attention_heads": int(variables[f"{side}/num_heads"]) for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": len(variables[f"{side}/layer_0/ffn/linear_0/bias"]) for side in ("encoder", "decoder")},
        **{"decoder_start_token_id": START, "pad_token_id": END, "bos_token_id": END, "eos_token_id": END, **ids},
    )


def _layers(variables: dict[str, Tensor], side: str) -> int:
    return len({name.split("/")[1] for name in variables if name.startswith(f"{side}/layer_") and "norm/" not in name})


def _whisper(variables: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for kind in ("weight", "bias"):
        for conv in ("conv1", "conv2"):
            yield f"encoder.{conv}.{kind}", variables[f"encoder/{conv}/{kind}"]
    yield "decoder.embed_tokens.weight", variables["decoder/embeddings/weight"]
    for side in ("encoder", "decoder"):
        yield f"{side}.embed_positions.weight", variables[f"{side}/position_encodings/encodings"]
        yield from _norm(variables, f"{side}/layer_norm", f"{side}.layer_norm")
        for i in range(_layers(variables, side)):
            own, new = f"{side}/layer_{i}", f"{side}.layers.{i}"
            yield from _attention(variables, f"{own}/self_attention", f"{new}.self_attn", SELF, "linear_1")
            if side == "decoder":
                yield from _attention(variables, f"{own}/attention", f"{new}.encoder_attn", CROSS, "linear_2")
            yield from _norm(variables, f"{own}/ffn/layer_norm", f"{new}.final_layer_norm")
            for linear, name in (("linear_0", "fc1"), ("linear_1", "fc2")):
                for kind in ("weight", "bias"):
                    yield f"{new}.{name}.{kind}", variables[f"{own}/ffn/{linear}/{kind}"]


def _attention(
    variables: dict[str, Tensor], own: str, new: str, projections: dict[str, tuple[str, int, int]], output: str
) -> Iterator[tuple[str, Tensor]]:
    yield from _norm(variables, f"{own}/layer_norm", f"{new}_layer_norm")
    for name, (linear, part, parts) in projections.items():
        for kind in ("weight", "bias"):
            if not (name == "k_proj" and kind == "bias"):  # Whisper's keys have none; the file has zeros there
                yield f"{new}.{name}.{kind}", variables[f"{own}/{linear}/{kind}"].chunk(parts)[part]
    for kind in ("weight", "bias"):
        yield f"{new}.out_proj.{kind}", variables[f"{own}/{output}/{kind}"]


def _norm(variables: dict[str, Tensor], own: str, new: str) -> Iterator[tuple[str, Tensor]]:
    yield f"{new}.weight", variables[f"{own}/gamma"]
    yield f"{new}.bias", variables[f"{own}/beta"]
