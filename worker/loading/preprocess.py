"""How raw samples become the inputs of a Hugging Face model: its own image processor or tokenizer, or arrays alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL.Image import Image, Resampling
from PIL.Image import new as new_image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer

from app.contract.errors import DatasetMismatch, ModelRejected
from app.contract.facts import TensorFacts
from worker.data.base import RawBatch
from worker.data.pictures import to_tensor
from worker.loading.folder import PREPROCESSOR, TOKENIZER, Folder
from worker.model import Inputs
from worker.vetting.boundary import first_line

PIXELS = "pixel_values"
# Where neither tokenizer nor model says how many tokens fit.
DEFAULT_LENGTH = 512
# A picture of no particular size, to find out which size a processor makes.
_PROBE = (300, 200)

Kind = Literal["arrays", "images", "text"]


@dataclass(frozen=True)
class Feeding:
    """What a model takes and how raw samples become that."""

    accepts: tuple[Kind, ...]
    inputs: tuple[TensorFacts, ...]
    encode: Callable[[RawBatch], Inputs]


def image_feeding(folder: Folder, module: Any) -> Feeding:
    """The folder's image processor; without one, pictures are resized to `config.image_size` and divided by 255."""
    pixels = _processor(folder) if folder.has(PREPROCESSOR) else _plain_pixels(module.config)
    shape: tuple[int | None, ...]
    if folder.has(PREPROCESSOR):
        shape = tuple(pixels([new_image("RGB", _PROBE)]).shape[1:])
    else:
        shape = _plain_shape(module.config)

    def encode(raw: RawBatch) -> Inputs:
        if isinstance(raw.inputs, dict):
            return _arrays(raw.inputs, ((PIXELS, torch.float32),))
        pictures = [image for image in raw.inputs if not isinstance(image, str)]
        if len(pictures) != len(raw.inputs):
            raise DatasetMismatch("The model takes pictures; the dataset holds text.", pointer="/dataset")
        return (pixels(pictures),)

    return Feeding(("arrays", "images"), (TensorFacts(name=PIXELS, shape=shape, dtype="float32"),), encode)


def _processor(folder: Folder) -> Callable[[list[Image]], Tensor]:
    try:
        processor = AutoImageProcessor.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
    except Exception as failure:  # processors raise errors of every class
        raise ModelRejected(f"{PREPROCESSOR!r} of the folder cannot be used: {first_line(failure)}") from failure

    def pixels(pictures: list[Image]) -> Tensor:
        batch: Tensor = processor(images=[image.convert("RGB") for image in pictures], return_tensors="pt")[PIXELS]
        return batch.to(torch.float32)

    return pixels


def _plain_shape(config: Any) -> tuple[int | None, ...]:
    size = getattr(config, "image_size", None)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return (getattr(config, "num_channels", 3), height, width)


def _plain_pixels(config: Any) -> Callable[[list[Image]], Tensor]:
    shape = _plain_shape(config)
    _, height, width = shape

    def pixels(pictures: list[Image]) -> Tensor:
        if height is not None and width is not None:
            pictures = [image.resize((width, height), Resampling.BILINEAR) for image in pictures]
        elif len({image.size for image in pictures}) > 1:
            raise DatasetMismatch(
                "The pictures have different sizes, and neither config.json nor a preprocessor_config.json says what "
                "to resize them to. Resize them before the upload, or add the preprocessor to the folder.",
                pointer="/dataset",
            )
        return torch.stack([to_tensor(image, shape) for image in pictures])

    return pixels


def text_feeding(folder: Folder, module: Any) -> Feeding:
    """The folder's tokenizer.json, cut at the model's maximum; without one the model takes arrays of ids alone."""
    tokenizer = _tokenizer(folder) if folder.has(TOKENIZER) else None
    taken = inspect.signature(module.forward).parameters
    offered = tokenizer.model_input_names if tokenizer is not None else ()
    names = ["input_ids", "attention_mask"]
    names += ["token_type_ids"] if "token_type_ids" in offered and "token_type_ids" in taken else []
    vocabulary = module.get_input_embeddings().num_embeddings
    longest = _longest(module, tokenizer)

    def encode(raw: RawBatch) -> Inputs:
        if isinstance(raw.inputs, dict):
            inputs = _arrays(raw.inputs, ((name, torch.int64) for name in names))
        else:
            texts = [text for text in raw.inputs if isinstance(text, str)]
            if tokenizer is None or len(texts) != len(raw.inputs):
                raise DatasetMismatch(
                    f"The model takes {'text' if tokenizer else 'token ids: its folder holds no tokenizer.json'}.",
                    pointer="/dataset",
                )
            made = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            inputs = tuple(made[name] for name in names)
        _check_ids(inputs[0], vocabulary, longest)
        return inputs

    facts = tuple(TensorFacts(name=name, shape=(None,), dtype="int64") for name in names)
    return Feeding(("arrays",) if tokenizer is None else ("arrays", "text"), facts, encode)


def _tokenizer(folder: Folder) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder.path, local_files_only=True, trust_remote_code=False, use_fast=True
        )
    except Exception as failure:  # tokenizers raise errors of every class
        raise ModelRejected(f"The folder's tokenizer cannot be used: {first_line(failure)}") from failure
    if not tokenizer.is_fast:
        raise ModelRejected("The folder's tokenizer needs Python code of its own; save it with a tokenizer.json.")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelRejected("The folder's tokenizer has no pad_token, so that texts cannot form a batch.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _longest(module: nn.Module, tokenizer: Any) -> int:
    """Tokens that fit: the least of what the tokenizer says and how many positions the model has left to give."""
    limits = [int(tokenizer.model_max_length)] if tokenizer is not None else []
    for name, layer in module.named_modules():
        if name.endswith("position_embeddings") and isinstance(layer, nn.Embedding):
            # RoBERTa and its kin start to count behind the padding index.
            first = 0 if layer.padding_idx is None else layer.padding_idx + 1
            limits.append(layer.num_embeddings - first)
    declared = getattr(module.config, "max_position_embeddings", None)
    if isinstance(declared, int) and declared > 0:
        limits.append(declared)
    known = [limit for limit in limits if 0 < limit < 1 << 20]  # "no limit" is written as 1e30
    return min(known, default=DEFAULT_LENGTH)


def _arrays(inputs: dict[str, Tensor], wanted: Iterable[tuple[str, torch.dtype]]) -> Inputs:
    pairs = list(wanted)
    if len(pairs) == len(inputs) == 1:
        return (next(iter(inputs.values())).to(pairs[0][1]),)
    return tuple(inputs[name].to(dtype) for name, dtype in pairs)


def _check_ids(ids: Tensor, vocabulary: int, longest: int) -> None:
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
        raise DatasetMismatch(
            f"The dataset holds token ids from {int(ids.min())} to {int(ids.max())}; the model knows 0 to "
            f"{vocabulary - 1}.",
            pointer="/dataset",
        )
    if ids.shape[-1] > longest:
        raise DatasetMismatch(
            f"The dataset's sequences have {ids.shape[-1]} tokens; the model takes at most {longest}.",
            pointer="/dataset",
        )
