"""Files as clients upload them: good ones, and the means to spoil them."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "very", "the", "a"]
TEXTS = ["good film", "very bad the film a"]


class Bomb:
    """A pickle that would make the file `path` if anybody loaded it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]  # the mode is a plain string
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def torch_saved(value: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def folder_files(folder: Path, top: str = "") -> dict[str, bytes]:
    """The files of a folder by name, below the folder `top`."""
    return {top + path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def linear_spec(**changes: Any) -> dict[str, Any]:
    """The smallest model: one Linear of 4 x 2."""
    return {
        "task": "image-classification",
        "architecture": {"layers": [{"type": "Linear", "in_features": 4, "out_features": 2}]},
        "input": {"shape": [4]},
    } | changes


def linear_file(path: Path, **changes: torch.Tensor) -> Path:
    torch.manual_seed(0)
    save_file(nn.Sequential(nn.Linear(4, 2)).state_dict() | changes, path)
    return path


def tokenizer_json() -> bytes:
    """A tokenizer of ten words."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return str(tokenizer.to_str()).encode()


def tokenizer_config(**changes: Any) -> bytes:
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64} | names | changes).encode()


def bert(folder: Path) -> Any:
    """A small random BERT classifier of three classes with a tokenizer, saved to `folder`."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        num_labels=3,
    )
    module = BertForSequenceClassification(config).eval()
    module.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_json())
    (folder / "tokenizer_config.json").write_bytes(tokenizer_config())
    return module
