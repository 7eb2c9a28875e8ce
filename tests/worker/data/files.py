"""Small datasets as clients upload them, made without the code under test."""

from __future__ import annotations

import io
import struct
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from worker.data import open_data
from worker.data.base import Data

PIXELS = np.stack([np.arange(12, dtype=np.uint8).reshape(3, 4) * 20] * 3, axis=-1)
WAVE = np.array([0, 1, -1, 16384, -32768, 32767, 5], np.int16)  # int16 [frames]


def opened(content: bytes | str, folder: Path, name: str = "upload", spec: dict[str, Any] | None = None) -> Data:
    """Opens an upload of that content and name."""
    path = folder / "uploaded"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    return open_data(path, name, spec or {}, scratch)


def png(pixels: np.ndarray = PIXELS) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def wav(samples: np.ndarray = WAVE, rate: int = 8000) -> bytes:
    """int16 [frames] or [frames, channels] as the standard library writes it."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


def raw_wav(data: bytes, *, coding: int = 1, channels: int = 1, bits: int = 16, **changes: int) -> bytes:
    """A WAV file by hand, so that its header can lie."""
    frame = changes.get("frame", channels * bits // 8)
    rate = changes.get("rate", 8000)
    layout = struct.pack("<HHIIHH", coding, channels, rate, 0, frame, bits)
    body = b"WAVEfmt " + struct.pack("<I", 16) + layout + b"data" + struct.pack("<I", changes.get("size", len(data)))
    return b"RIFF" + struct.pack("<I", len(body) + len(data)) + body + data


def flac(samples: np.ndarray = WAVE, rate: int = 8000) -> bytes:
    """int16 [frames] or [frames, channels] as libsndfile writes it."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def table(rows: list[dict[str, Any]], schema: pa.Schema | None = None, **options: Any) -> bytes:
    """Rows as a Parquet file."""
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, **options)
    return buffer.getvalue()


def jsonl(*rows: dict[str, Any]) -> bytes:
    import json

    return "".join(json.dumps(row) + "\n" for row in rows).encode()
