"""Sounds: decoded as the standard library and libsndfile read them; headers that lie are refused by name."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import soundfile

from app.contract.errors import DatasetRejected
from tests.worker.data.files import WAVE, flac, raw_wav, wav
from worker.data import sounds
from worker.data.sounds import decode, read_header

STEREO = np.stack([WAVE, WAVE[::-1]], axis=1)
NOISE = np.random.default_rng(0).uniform(-0.9, 0.9, (70_000, 3))


def test_wav_of_the_standard_library() -> None:
    sound = decode(wav(rate=16_000), "a.wav")
    assert sound.rate == 16_000
    assert sound.samples.tolist() == [0, 1 / 32768, -1 / 32768, 0.5, -1.0, 32767 / 32768, 5 / 32768]


def test_channels_are_averaged() -> None:
    expected = (WAVE.astype(float) + WAVE[::-1]) / 2 / 32768
    assert np.allclose(decode(wav(STEREO), "a.wav").samples.numpy(), expected, atol=1e-7)
    assert np.allclose(decode(flac(STEREO), "a.flac").samples.numpy(), expected, atol=1e-7)


WAV_CODINGS = ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")


@pytest.mark.parametrize(
    ("container", "coding"),
    [(container, coding) for container in ("WAV", "WAVEX") for coding in WAV_CODINGS]
    + [("FLAC", coding) for coding in ("PCM_S8", "PCM_16", "PCM_24")],
)
def test_every_width_is_read_as_libsndfile_reads_it(container: str, coding: str) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, NOISE, 44_100, format=container, subtype=coding)
    expected = soundfile.read(io.BytesIO(buffer.getvalue()), always_2d=True)[0].mean(axis=1)
    sound = decode(buffer.getvalue(), "a")
    assert sound.rate == 44_100
    assert np.allclose(sound.samples.numpy(), expected, atol=1e-6)
    assert read_header(buffer.getvalue(), "a").frames == 70_000


def test_chunks_of_other_kinds_are_passed_over() -> None:
    content = wav()
    at = content.index(b"data")
    extra = b"LIST" + struct.pack("<I", 3) + b"abc\0"  # an odd size is padded
    assert (
        decode(content[:at] + extra + content[at:] + b"junk", "a.wav").samples.tolist()
        == decode(content, "a.wav").samples.tolist()
    )


def test_a_stream_that_never_learned_its_length_is_read_to_its_end() -> None:
    assert len(decode(raw_wav(WAVE.tobytes(), size=0xFFFFFFFF), "a.wav").samples) == len(WAVE)


def flac_claiming(frames: int) -> bytes:
    """FLAC whose description claims a number of samples (its last 36 bits before the checksum)."""
    content = bytearray(flac())
    packed = int.from_bytes(content[18:26], "big") & ~((1 << 36) - 1) | frames
    content[18:26] = packed.to_bytes(8, "big")
    return bytes(content)


def test_flac_that_does_not_say_its_length_is_read_to_its_end() -> None:
    assert decode(flac_claiming(0), "a").samples.tolist() == decode(flac(), "a").samples.tolist()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no WAV or FLAC"),
        (b"RIFF", "no WAV or FLAC"),
        (b"ID3\3" + bytes(50), "no WAV or FLAC"),
        (b"OggS" + bytes(50), "no WAV or FLAC"),
        (b"RIFF\0\0\0\0WAVE", "lacks its format or its data"),
        (b"RIFF\0\0\0\0WAVEdata\4\0\0\0abcd", "lacks its format"),
        (b"RIFF\0\0\0\0WAVEfmt \4\0\0\0abcd", "format is cut short"),
        (b"RIFF\0\0\0\0WAVE" + b"junk\0\0\0\0" * 2000, "more than 1000 chunks"),
        (raw_wav(b"ab", size=1 << 30), "promises 1073741824 bytes of sound and 2 came"),
        (raw_wav(b""), "0 samples"),
        (raw_wav(b"a"), "0 samples"),
        (raw_wav(b"ab", coding=2, bits=4), "coding 2 with 4 bits"),
        (raw_wav(b"ab", coding=17), "coding 17"),
        (raw_wav(b"ab", bits=64), "coding 1 with 64 bits"),
        (raw_wav(b"ab", frame=0), "in 0 bytes"),
        (raw_wav(b"ab", frame=7), "in 7 bytes"),
        (raw_wav(b"ab", channels=0), "0 channels"),
        (raw_wav(b"ab" * 40, channels=33), "33 channels at 8000 Hz"),
        (raw_wav(b"ab", rate=1), "1 channels at 1 Hz"),
        (raw_wav(b"ab", rate=1 << 31), "at 2147483648 Hz"),
        (raw_wav(struct.pack("<f", float("nan")), coding=3, bits=32), "NaN"),
        (raw_wav(struct.pack("<d", 1e300), coding=3, bits=64), "infinity"),
        (b"fLaC", "does not start with its stream's description"),
        (b"fLaC\1\0\0\x22" + bytes(40), "does not start"),
        (b"fLaC\0\0\0\x22" + bytes(40), "at 0 Hz"),
        (flac()[:-8], "'x' (is damaged or )?was cut short"),
        (flac_claiming(1 << 35), "too long: 34359738368 samples"),
        (flac_claiming(9), "promises 9 samples, it has 7"),
        (flac_claiming(3), "promises 3 samples, it has 7"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_what_is_no_sound_is_named(content: bytes, words: str) -> None:
    with pytest.raises(DatasetRejected, match=words) as caught:
        decode(content, "x")
    assert "'x'" in caught.value.detail


def test_a_sound_that_grows_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    silence = flac(np.zeros(1 << 20, np.int16))
    assert len(silence) < 20_000  # a bomb: a hundred times smaller than what it holds
    content = bytearray(silence)
    content[21] &= 0xF0
    content[22:26] = bytes(4)  # the length is not said
    monkeypatch.setattr(sounds, "MAX_VALUES", 100_000)
    with pytest.raises(DatasetRejected, match="too long"):
        decode(bytes(content), "x")


@pytest.mark.parametrize("kind", ["AIFF", "AU", "OGG", "CAF", "W64", "RF64"])
def test_other_formats_never_reach_libsndfile(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, WAVE, 8000, format=kind)
    monkeypatch.setattr(soundfile, "SoundFile", None)
    with pytest.raises(DatasetRejected, match="no WAV or FLAC"):
        decode(buffer.getvalue(), "x")
