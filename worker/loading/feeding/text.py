"""Text: the folder's tokenizer, cut at what the model takes; for classes, tags, vectors and the next word."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from app.contract.errors import DatasetMismatch, ModelRejected
from app.contract.facts import DataKind, TensorFacts
from worker.data.base import RawBatch
from worker.data.batch import Inputs
from worker.loading.feeding.base import Feeding, arrays, wrong_kind
from worker.loading.folder import SENTENCE_CONFIG, TOKENIZER, Folder
from worker.objectives.base import Task
from worker.objectives.language import CausalLm, MaskedLm
from worker.objectives.tokens import TokenClassification
from worker.vetting.boundary import first_line

# Where neither tokenizer nor model says how many tokens fit.
DEFAULT_LENGTH = 512
# Of a language model's samples: its logits take a vocabulary a token, so that a whole context would be gigabytes.
LANGUAGE_LENGTH = 512

Tokenize = Callable[[list[str]], Any]


def text_feeding(folder: Folder, module: Any, task: Task) -> Feeding:
    """Strings to ids, for one answer a text. Without a tokenizer.json the model takes arrays of ids alone."""
    return _feeding(folder, module, task, "text")


def causal_feeding(folder: Folder, module: Any) -> Feeding:
    """Strings to ids, each of which is predicted from those before it."""
    module.config.use_cache = False  # a forward pass is a whole text here, and a cache is no output
    return _feeding(folder, module, CausalLm(), "text", LANGUAGE_LENGTH)


def masked_feeding(folder: Folder, module: Any) -> Feeding:
    """Strings to ids, some of which the task hides. Raises ModelRejected without a tokenizer with a mask token."""
    tokenizer = open_tokenizer(folder) if folder.has(TOKENIZER) else None
    if tokenizer is None or tokenizer.mask_token_id is None:
        raise ModelRejected("A masked language model needs its tokenizer.json with a mask_token in the folder.")
    vocabulary = module.get_input_embeddings().num_embeddings
    task = MaskedLm(tokenizer.mask_token_id, tokenizer.all_special_ids, vocabulary)
    return _feeding(folder, module, task, "text", LANGUAGE_LENGTH)


def token_feeding(folder: Folder, module: Any) -> Feeding:
    """Lists of words to ids; the task finds each word's first token again."""
    tokenizer = open_tokenizer(folder) if folder.has(TOKENIZER) else None
    if tokenizer is None:
        return _feeding(folder, module, TokenClassification(), "tokens")
    # Byte-level tokenizers write a space before a word, also before the first.
    tokenizer = open_tokenizer(folder, add_prefix_space=True)
    longest = longest_input(folder, module, tokenizer)

    def words(raw: RawBatch) -> list[list[int | None]]:
        made = _split_words(tokenizer, raw, longest)
        return [made.word_ids(row) for row in range(len(raw.inputs))]

    def tokenize(raw: RawBatch) -> Any:
        return _split_words(tokenizer, raw, longest)

    return _feeding(folder, module, TokenClassification(words), "tokens", tokenize=tokenize)


def _split_words(tokenizer: Any, raw: RawBatch, longest: int) -> Any:
    samples = [sample for sample in raw.inputs if isinstance(sample, list)]
    if len(samples) != len(raw.inputs):
        raise wrong_kind("lists of words")
    return tokenizer(
        samples, is_split_into_words=True, padding=True, truncation=True, max_length=longest, return_tensors="pt"
    )


def _feeding(
    folder: Folder,
    module: Any,
    task: Task,
    kind: DataKind,
    cut: int = 1 << 20,
    tokenize: Callable[[RawBatch], Any] | None = None,
) -> Feeding:
    """`cut` is the most tokens of a text that are used where the model would take more."""
    tokenizer = open_tokenizer(folder) if folder.has(TOKENIZER) else None
    names = _input_names(module, tokenizer)
    vocabulary = module.get_input_embeddings().num_embeddings
    longest = longest_input(folder, module, tokenizer)

    def strings(raw: RawBatch) -> Any:
        texts = [text for text in raw.inputs if isinstance(text, str)]
        if tokenizer is None or len(texts) != len(raw.inputs):
            raise wrong_kind("text" if tokenizer else "token ids (its folder holds no tokenizer.json)")
        return tokenizer(texts, padding=True, truncation=True, max_length=min(longest, cut), return_tensors="pt")

    def encode(raw: RawBatch) -> Inputs:
        if isinstance(raw.inputs, dict):
            inputs = arrays(raw.inputs, ((name, torch.int64) for name in names))
        else:
            made = (tokenize or strings)(raw)
            inputs = tuple(made[name] for name in names)
        _check_ids(inputs[0], vocabulary, longest)
        return inputs

    facts = tuple(TensorFacts(name=name, shape=(None,), dtype="int64") for name in names)
    return Feeding(("arrays",) if tokenizer is None else ("arrays", kind), facts, encode, task)


def _input_names(module: Any, tokenizer: Any) -> Sequence[str]:
    taken = inspect.signature(module.forward).parameters
    offered = tokenizer.model_input_names if tokenizer is not None else ()
    names = ["input_ids", "attention_mask"]
    return names + (["token_type_ids"] if "token_type_ids" in offered and "token_type_ids" in taken else [])


def open_tokenizer(folder: Folder, **options: Any) -> Any:
    """The folder's fast tokenizer, with something to pad with on the right. Raises ModelRejected for any other."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder.path, local_files_only=True, trust_remote_code=False, use_fast=True, **options
        )
    except Exception as failure:  # tokenizers raise errors of every class
        raise ModelRejected(f"The folder's tokenizer cannot be used: {first_line(failure)}") from failure
    if not tokenizer.is_fast:
        raise ModelRejected("The folder's tokenizer needs Python code of its own; save it with a tokenizer.json.")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelRejected("The folder's tokenizer has no pad_token, so that texts cannot form a batch.")
        tokenizer.pad_token = tokenizer.eos_token
    # On the left, as for generation, padding would be rows that attend to nothing: not-a-numbers in some runtimes.
    tokenizer.padding_side = "right"
    return tokenizer


def longest_input(folder: Folder, module: nn.Module, tokenizer: Any) -> int:
    """Tokens that fit: the least of what the tokenizer says and how many positions the model has left to give."""
    limits = [int(tokenizer.model_max_length)] if tokenizer is not None else []
    for name, layer in module.named_modules():
        if name.endswith("position_embeddings") and isinstance(layer, nn.Embedding):
            # RoBERTa and its kin start to count behind the padding index.
            first = 0 if layer.padding_idx is None else layer.padding_idx + 1
            limits.append(layer.num_embeddings - first)
    limits.append(_declared(module.config, "max_position_embeddings"))
    limits.append(_sentence_length(folder))
    known = [limit for limit in limits if 0 < limit < 1 << 20]  # "no limit" is written as 1e30
    return min(known, default=DEFAULT_LENGTH)


def _declared(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0


def _sentence_length(folder: Folder) -> int:
    """What sentence-transformers cuts texts at, 0 where the folder does not say."""
    try:
        value = json.loads(folder.originals.get(SENTENCE_CONFIG, b"{}"))["max_seq_length"]
    except (ValueError, KeyError, TypeError):
        return 0
    return value if isinstance(value, int) else 0


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
