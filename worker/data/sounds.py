"""Sounds: WAV decoded here, FLAC by libsndfile, both with caps and as one channel of float32.

Only headers that were vetted here reach libsndfile, and of its two dozen formats FLAC alone: its readers of compressed
WAV overflow on hostile headers (libsndfile 1.2.2, pull request 1123), and plain WAV takes no library.

Sources: Microsoft and IBM, "Multimedia Programming Interface and Data Specifications 1.0" (1991), and RFC 9639 (FLAC).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from app.contract.errors import DatasetRejected
from worker.data.base import Sound

MAX_FILE_BYTES = 256 << 20
MAX_VALUES = 1 << 26  # frames x channels of one sound: 70 minutes at 16 kHz, 23 at 48 kHz, mono
MAX_CHANNELS = 32
MIN_RATE, MAX_RATE = 100, 768_000  # seismic records and the fastest converters
MAX_CHUNKS = 1000  # of a WAV file; recorders write ten
BLOCK_FRAMES = 1 << 16  # decoded at a time
ADVICE = "Save it as WAV (PCM of 8 to 32 bits or float) or FLAC."

_STREAMED = 0xFFFFFFFF  # the data size that a writer leaves which cannot go back to the header
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_FORMATS = {(_PCM, 8), (_PCM, 16), (_PCM, 24), (_PCM, 32), (_FLOAT, 32), (_FLOAT, 64)}
_STREAMINFO_BYTES = 34


@dataclass(frozen=True)
class SoundHeader:
    """What a file says of itself. `frames` are those that came in WAV, and a mere claim (0: none) in FLAC."""

    format: str
    rate: int
    channels: int
    frames: int
    start: int = 0  # of the samples in a WAV file
    coding: int = _PCM
    bits: int = 16


def read_header(data: bytes, name: str) -> SoundHeader:
    """The checked header of a sound file. Raises DatasetRejected, naming the file."""
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        header = _wav_header(data, name)
    elif data[:4] == b"fLaC":
        header = _flac_header(data, name)
    else:
        raise DatasetRejected(f"{name!r} is no WAV or FLAC file. {ADVICE}")
    if not (1 <= header.channels <= MAX_CHANNELS and MIN_RATE <= header.rate <= MAX_RATE):
        raise DatasetRejected(
            f"{name!r} has {header.channels} channels at {header.rate} Hz; taken are 1 to {MAX_CHANNELS} channels at "
            f"{MIN_RATE} to {MAX_RATE} Hz."
        )
    _check_length(header.frames, header, name)
    return header


def decode(data: bytes, name: str) -> Sound:
    """The sound of a file, its channels averaged. Integers are scaled to [-1, 1]; floats stay as they are.

    Raises DatasetRejected where the file is damaged, empty, too long or holds NaN or infinity.
    """
    header = read_header(data, name)
    blocks = list(_wav_blocks(data, header) if header.format == "WAV" else _flac_blocks(data, header, name))
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if not len(samples):
        raise DatasetRejected(f"{name!r} holds no sound: it has 0 samples.")
    if not np.isfinite(samples).all():
        raise DatasetRejected(f"{name!r} holds NaN or infinity. Save it with finite samples.")
    return Sound(torch.from_numpy(samples), header.rate)


def _check_length(frames: int, header: SoundHeader, name: str) -> None:
    if frames * header.channels > MAX_VALUES:
        raise DatasetRejected(
            f"{name!r} is too long: {frames} samples in {header.channels} channels; at most {MAX_VALUES} in all are "
            "taken. Cut it into pieces."
        )


def _mono(values: NDArray[Any]) -> NDArray[np.float32]:
    """[frames, channels] to float32 [frames]."""
    return values[:, 0].astype(np.float32) if values.shape[1] == 1 else values.mean(axis=1, dtype=np.float32)


def _wav_header(data: bytes, name: str) -> SoundHeader:
    layout: tuple[int, int, int, int, int] | None = None
    for kind, start, size in _wav_chunks(data, name):
        if kind == b"fmt ":
            layout = _wav_format(data[start : start + min(size, 40)], name)
        elif kind == b"data":
            if layout is None:
                break
            coding, channels, rate, frame, bits = layout
            available = len(data) - start
            if size > available and size != _STREAMED:
                raise DatasetRejected(
                    f"{name!r} was cut short: its header promises {size} bytes of sound and {available} came."
                )
            return SoundHeader("WAV", rate, channels, min(size, available) // frame, start, coding, bits)
    raise DatasetRejected(f"{name!r} is a damaged WAV file: it lacks its format or its data. {ADVICE}")


def _wav_chunks(data: bytes, name: str) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and claimed size of every chunk."""
    at = 12
    for _ in range(MAX_CHUNKS):
        if at + 8 > len(data):
            return
        (size,) = struct.unpack_from("<I", data, at + 4)
        yield data[at : at + 4], at + 8, size
        at += 8 + size + size % 2
    raise DatasetRejected(f"{name!r} has more than {MAX_CHUNKS} chunks: it is damaged. {ADVICE}")


def _wav_format(chunk: bytes, name: str) -> tuple[int, int, int, int, int]:
    """Coding, channels, rate, bytes a frame and bits a sample."""
    if len(chunk) < 16:
        raise DatasetRejected(f"{name!r} is a damaged WAV file: its format is cut short.")
    coding, channels, rate, _, frame, bits = struct.unpack_from("<HHIIHH", chunk)
    if coding == _EXTENSIBLE and len(chunk) >= 26:
        (coding,) = struct.unpack_from("<H", chunk, 24)
    if (coding, bits) not in _FORMATS:
        raise DatasetRejected(f"{name!r} is WAV of coding {coding} with {bits} bits, which is not taken. {ADVICE}")
    if frame != channels * bits // 8 or frame == 0:
        raise DatasetRejected(f"{name!r} is a damaged WAV file: {channels} channels of {bits} bits in {frame} bytes.")
    return coding, channels, rate, frame, bits


def _wav_blocks(data: bytes, header: SoundHeader) -> Iterator[NDArray[np.float32]]:
    frame = header.channels * header.bits // 8
    for first in range(0, header.frames, BLOCK_FRAMES):
        count = min(BLOCK_FRAMES, header.frames - first)
        raw = data[header.start + first * frame : header.start + (first + count) * frame]
        yield _mono(_wav_values(raw, header).reshape(count, header.channels))


def _wav_values(raw: bytes, header: SoundHeader) -> NDArray[Any]:
    match header.coding, header.bits:
        case (3, bits):
            return np.frombuffer(raw, f"<f{bits // 8}")
        case (_, 8):  # the one width that is unsigned
            return (np.frombuffer(raw, np.uint8).astype(np.float32) - 128) / np.float32(128)
        case (_, 24):
            padded = np.zeros((len(raw) // 3, 4), np.uint8)
            padded[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
            return padded.view("<i4")[:, 0] / np.float32(1 << 31)
        case (_, bits):
            return np.frombuffer(raw, f"<i{bits // 8}") / np.float32(1 << (bits - 1))


def _flac_header(data: bytes, name: str) -> SoundHeader:
    """STREAMINFO: the first block of every FLAC file (RFC 9639, section 8.2)."""
    if len(data) < 8 + _STREAMINFO_BYTES or data[4] & 127 or int.from_bytes(data[5:8], "big") != _STREAMINFO_BYTES:
        raise DatasetRejected(f"{name!r} is a damaged FLAC file: it does not start with its stream's description.")
    packed = int.from_bytes(data[18:26], "big")
    return SoundHeader("FLAC", rate=packed >> 44, channels=(packed >> 41 & 7) + 1, frames=packed & (1 << 36) - 1)


def _flac_blocks(data: bytes, header: SoundHeader, name: str) -> Iterator[NDArray[np.float32]]:
    """Decoded until the stream ends: what the header says of its length is hidden from the decoder, then compared."""
    import soundfile  # a library that sounds in WAV do without

    class Forward(soundfile.SoundFile):  # type: ignore[misc]  # a class without types
        def seekable(self) -> bool:
            return False  # else it seeks after every block, which fails where the length is not known

    frames = 0
    unknown = data[:21] + bytes([data[21] & 0xF0, 0, 0, 0, 0]) + data[26:]
    try:
        with Forward(io.BytesIO(unknown)) as file:
            if (file.format, file.samplerate, file.channels) != ("FLAC", header.rate, header.channels):
                raise DatasetRejected(f"{name!r} is a damaged FLAC file: its parts contradict each other.")
            while len(block := file.read(BLOCK_FRAMES, dtype="float32", always_2d=True)):
                frames += len(block)
                _check_length(frames, header, name)
                yield _mono(block)
    except soundfile.LibsndfileError as failure:
        raise DatasetRejected(f"{name!r} is damaged or was cut short ({failure}). {ADVICE}") from failure
    if header.frames not in (0, frames):
        raise DatasetRejected(
            f"{name!r} is damaged or was cut short: its header promises {header.frames} samples, it has {frames}."
        )
