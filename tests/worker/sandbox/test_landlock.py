"""What is handed to the kernel, against the layout in its header (include/uapi/linux/landlock.h), and what it says."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from worker.sandbox import landlock
from worker.sandbox.landlock import Access, handled, path_beneath, ruleset_attributes

ABI_1 = (1 << 13) - 1  # execute to make_sym, 13 rights


def test_each_abi_handles_what_it_knows() -> None:
    assert [int(handled(version)) for version in range(1, 8)] == [
        ABI_1,
        ABI_1 | 1 << 13,
        ABI_1 | 1 << 13 | 1 << 14,
        ABI_1 | 1 << 13 | 1 << 14,
        *[ABI_1 | 1 << 13 | 1 << 14 | 1 << 15] * 3,
    ]


def test_the_attributes_of_a_ruleset() -> None:
    """Three 64-bit words: files, network (ABI 4), scopes (ABI 6); an older kernel is given no more than it knows."""
    assert [len(ruleset_attributes(version)) for version in range(1, 8)] == [8, 8, 8, 16, 16, 24, 24]
    assert struct.unpack("=QQQ", ruleset_attributes(7)) == (0xFFFF, 0b11, 0b11)


def test_a_rule_is_packed() -> None:
    rule = path_beneath(Access.READ_FILE | Access.READ_DIR, 7)
    assert rule == bytes([0b1100, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0])


@pytest.mark.landlock
def test_the_kernel_takes_every_older_form() -> None:
    """A ruleset of each ABI up to this kernel's; what is not granted is refused, what does not exist grants nothing."""
    code = (
        "import os, sys; from pathlib import Path; from worker.sandbox import kernel, landlock\n"
        "kernel.prctl(38, 1)\n"
        "grants = [(Path('/usr'), landlock.Access.READ_FILE), (Path('/no/such'), landlock.Access.READ_FILE),\n"
        "          (Path('/dev/null'), ~landlock.Access(0))]\n"
        "landlock.restrict(grants, int(sys.argv[1]))\n"
        "open('/dev/null', 'w').close(); open('/usr/bin/env', 'rb').close()\n"
        "for path in ('/etc/passwd', '/dev/zero'):\n"
        "    try: open(path)\n"
        "    except PermissionError: print('refused')\n"
    )
    for version in range(1, landlock.abi() + 1):
        done = subprocess.run([sys.executable, "-c", code, str(version)], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["refused", "refused"]


def test_no_more_is_asked_for_than_this_module_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landlock, "syscall", lambda *_: 12)
    assert landlock.abi() == (landlock.NEWEST if sys.platform == "linux" else 0)


def test_a_kernel_that_refuses_the_question_offers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(landlock, "syscall", refuse)
    assert landlock.abi() == 0


def test_paths_are_opened_and_closed(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Bad file descriptor"):
        landlock._grant(-1, tmp_path, Access.READ_FILE)
    assert len(os.listdir("/proc/self/fd")) == before
