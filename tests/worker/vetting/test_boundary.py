"""What a library throws becomes a refusal; what is no fault of the file does not."""

from __future__ import annotations

import errno
import struct

import pytest

from app.contract.errors import ModelRejected, OutOfMemory
from worker.vetting.boundary import refusing


@pytest.mark.parametrize(
    "thrown",
    [
        KeyError("weights"),
        struct.error("unpack requires 4 bytes"),
        RecursionError("too deep"),
        OverflowError("too large"),
        RuntimeError("bad file\nwith a trace"),
        OSError(errno.EINVAL, "Invalid argument"),
        ZeroDivisionError(),
    ],
)
def test_what_a_library_throws_is_a_refusal(thrown: Exception) -> None:
    words = f"'m.pt' cannot be read as a model: {type(thrown).__name__}"
    with pytest.raises(ModelRejected, match=words) as caught, refusing(ModelRejected, "m.pt", "a model"):
        raise thrown
    assert "\n" not in caught.value.detail


def test_local_paths_are_not_told() -> None:
    with pytest.raises(ModelRejected) as caught, refusing(ModelRejected, "m.pt", "a model"):
        raise FileNotFoundError(errno.ENOENT, "No such file", "/srv/scratch/x")
    assert "/srv" not in caught.value.detail


@pytest.mark.parametrize(
    ("thrown", "said"),
    [
        (MemoryError(), "more memory than this worker grants"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9."),
            "more memory than this worker",
        ),
        (RuntimeError("void* BFCArena::AllocateRaw() Failed to allocate memory for 9"), "more memory than this worker"),
        (RuntimeError("std::bad_alloc"), "more memory than this worker grants"),
        (MemoryError("its output takes 9 bytes"), "MemoryError: its output takes 9 bytes"),
    ],
)
def test_memory_has_a_sentence_of_its_own(thrown: Exception, said: str) -> None:
    with pytest.raises(ModelRejected, match=said), refusing(ModelRejected, "m.pt", "a model"):
        raise thrown


def test_a_full_disk_is_not_the_files_fault() -> None:
    with pytest.raises(OSError, match="No space left"), refusing(ModelRejected, "m.pt", "a model"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_errors_of_the_tree_pass() -> None:
    with pytest.raises(OutOfMemory), refusing(ModelRejected, "m.pt", "a model"):
        raise OutOfMemory
