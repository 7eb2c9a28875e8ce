"""Sound: the folder's feature extractor, resampled to its rate; transcripts by the folder's tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoTokenizer

from app.contract.errors import ModelRejected
from app.contract.facts import TensorFacts
from worker.data.base import RawBatch, Sound
from worker.data.batch import Inputs
from worker.loading.feeding.base import Feeding, arrays, wrong_kind
from worker.loading.folder import PREPROCESSOR, PROCESSOR, Folder
from worker.objectives.base import Task
from worker.objectives.speech import Ctc, Transcription
from worker.vetting.boundary import first_line

MASK = "attention_mask"
DECODER_IDS = "decoder_input_ids"
# Of a transcript; Whisper's decoder takes 448.
DEFAULT_TRANSCRIPT = 448
EXAMPLE_TRANSCRIPT = 4  # tokens that any decoder has room for


class Features:
    """A feature extractor: what it makes of a second of sound, and of a batch of sounds.

    Extractors of waveforms pad to the longest of a batch; those of spectrograms to the length that the model takes.
    """

    def __init__(self, folder: Folder) -> None:
        self._extractor = _open(folder)
        self.rate = int(self._extractor.sampling_rate)
        self.name = str(self._extractor.model_input_names[0])
        probe = self._extract([np.zeros(self.rate, np.float32)])[self.name]
        self.is_waveform = probe.ndim == 2
        shape = (None,) if self.is_waveform else tuple(probe.shape[1:])
        self.masked = self.is_waveform and bool(self._extractor.return_attention_mask)
        self.inputs = [TensorFacts(name=self.name, shape=shape, dtype="float32")]
        if self.masked:
            self.inputs.append(TensorFacts(name=MASK, shape=(None,), dtype="int64"))

    def encode(self, raw: RawBatch) -> Inputs:
        """[batch, samples] and perhaps its mask, or [batch, …] features."""
        if isinstance(raw.inputs, dict):
            return arrays(raw.inputs, ((tensor.name, getattr(torch, tensor.dtype)) for tensor in self.inputs))
        sounds = [sound for sound in raw.inputs if isinstance(sound, Sound)]
        if len(sounds) != len(raw.inputs):
            raise wrong_kind("sounds")
        options = {"padding": True, "return_attention_mask": self.masked} if self.is_waveform else {}
        made = self._extract([resampled(sound, self.rate) for sound in sounds], **options)
        return tuple(made[tensor.name].to(getattr(torch, tensor.dtype)) for tensor in self.inputs)

    def _extract(self, waves: list[NDArray[np.float32]], **options: Any) -> Any:
        return self._extractor(waves, sampling_rate=self.rate, return_tensors="pt", **options)


def audio_feeding(folder: Folder, module: Any, task: Task) -> Feeding:
    """Sounds to one answer each."""
    features = Features(folder)
    return Feeding(("arrays", "audio"), tuple(features.inputs), features.encode, task, features.rate)


def ctc_feeding(folder: Folder, module: Any) -> Feeding:
    """Sounds to symbols a frame. The tokenizer is transformers' own; the blank is its padding."""
    features = Features(folder)
    tokenizer = _tokenizer(folder)
    capitals = _only_capitals(tokenizer.get_vocab())

    def spell(texts: list[str]) -> list[list[int]]:
        cased = [text.upper() if capitals else text for text in texts]
        ids: list[list[int]] = tokenizer(cased, add_special_tokens=False).input_ids
        return ids

    def read(ids: Tensor) -> list[str]:
        said: list[str] = tokenizer.batch_decode(ids)
        return said

    task = Ctc(spell, read, _frames(module, features.masked), int(tokenizer.pad_token_id))
    return Feeding(("arrays", "audio"), tuple(features.inputs), features.encode, task, features.rate)


def _frames(module: Any, masked: bool) -> Callable[[Inputs, int], Tensor]:
    def frames(inputs: Inputs, given: int) -> Tensor:
        if not masked:
            return torch.full((len(inputs[0]),), given, dtype=torch.int64)
        lengths: Tensor = module._get_feat_extract_output_lengths(inputs[1].sum(-1))
        return lengths.to(torch.int64).clamp(max=given)

    return frames


def transcription_feeding(folder: Folder, module: Any) -> Feeding:
    """Sounds and the transcript so far to the next token; the second input is the decoder's ids."""
    module.config.use_cache = False  # a forward pass is a whole transcript here, and a cache is no output
    features = Features(folder)
    tokenizer = _tokenizer(folder)
    *prefix, end = tokenizer("").input_ids
    first = module.config.decoder_start_token_id
    start = prefix if first is None or prefix[:1] == [first] else [first, *prefix]
    if not start:
        raise ModelRejected("config.json names no decoder_start_token_id, which every transcript begins with.")

    def spell(texts: list[str]) -> list[list[int]]:
        # A space before the first word, as the models write it.
        ids = tokenizer([f" {text.strip()}" for text in texts]).input_ids
        return [own[len(prefix) : -1] for own in ids]

    def read(ids: Tensor) -> list[str]:
        said: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return said

    longest = getattr(module.config, "max_target_positions", None) or DEFAULT_TRANSCRIPT
    task = Transcription(read, spell, start, int(end), int(longest))
    decoder = TensorFacts(name=DECODER_IDS, shape=(None,), dtype="int64")

    def encode(raw: RawBatch) -> Inputs:
        sounds = features.encode(raw)
        if isinstance(raw.inputs, dict) and DECODER_IDS in raw.inputs:
            return (*sounds, raw.inputs[DECODER_IDS].to(torch.int64))
        return (*sounds, task.decoder_inputs(raw))

    return Feeding(("arrays", "audio"), (*features.inputs, decoder), encode, task, EXAMPLE_TRANSCRIPT)


def resampled(sound: Sound, rate: int) -> NDArray[np.float32]:
    """float32 [samples] at another rate, band-limited."""
    samples: NDArray[np.float32] = sound.samples.numpy()
    return samples if sound.rate == rate else np.asarray(soxr.resample(samples, sound.rate, rate), np.float32)


def _open(folder: Folder) -> Any:
    if not (folder.has(PREPROCESSOR) or folder.has(PROCESSOR)):
        raise ModelRejected(
            f"The folder holds no {PREPROCESSOR}, which says how sound becomes the model's input. "
            "Save the processor or feature extractor into it with save_pretrained."
        )
    try:
        return AutoFeatureExtractor.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
    except Exception as failure:  # extractors raise errors of every class
        raise ModelRejected(f"The folder's feature extractor cannot be used: {first_line(failure)}") from failure


def _tokenizer(folder: Folder) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
    except Exception as failure:  # tokenizers raise errors of every class
        raise ModelRejected(f"The folder's tokenizer cannot be used: {first_line(failure)}") from failure


def _only_capitals(vocabulary: dict[str, int]) -> bool:
    letters = [symbol for symbol in vocabulary if len(symbol) == 1 and symbol.isalpha()]
    return any(symbol.isupper() for symbol in letters) and not any(symbol.islower() for symbol in letters)
