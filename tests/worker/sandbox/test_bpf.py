"""The filter, run by an interpreter of its own: what the kernel decides for a call, on either architecture."""

from __future__ import annotations

import errno
import re
import signal
import socket
import struct
from pathlib import Path

import pytest

from worker.sandbox import seccomp
from worker.sandbox.bpf import ALLOW, ARCHITECTURES, ERRNO, KILL_PROCESS, Architecture, Argument, Rule, assemble
from worker.sandbox.syscalls import NUMBERS

X86, ARM = ARCHITECTURES["x86_64"], ARCHITECTURES["aarch64"]
PID = 4321
HEADERS = {  # the kernel's own tables; the second is the one that AArch64 uses
    0: Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    1: Path("/usr/include/asm-generic/unistd.h"),
}


def decide(program: bytes, audit: int, number: int, *arguments: int) -> int:
    """What the program returns, by the meaning of classic BPF (McCanne & Jacobson 1993) and `struct seccomp_data`."""
    padded = (*arguments, *(0,) * 6)[:6]
    data = struct.pack("=IIQ6Q", number, audit, 0, *(value & (1 << 64) - 1 for value in padded))
    at = accumulator = 0
    while True:
        code, if_true, if_false, constant = struct.unpack_from("=HBBI", program, 8 * at)
        at += 1
        match code:
            case 0x20:  # load a word
                (accumulator,) = struct.unpack_from("=I", data, constant)
            case 0x54:  # and
                accumulator &= constant
            case 0x15:  # jump if equal
                at += if_true if accumulator == constant else if_false
            case 0x25:  # jump if greater
                at += if_true if accumulator > constant else if_false
            case 0x06:
                return constant
            case _:
                raise AssertionError(f"an instruction that the filter does not use: {code:#x}")


def verdict(name: str, *arguments: int, arch: str = "x86_64", landlock: int = 7, accelerator: bool = False) -> object:
    """`allow`, or the name of the error, or `nothing` where success is reported and nothing done."""
    architecture = ARCHITECTURES[arch]
    program = assemble(architecture, seccomp.rules(landlock, accelerator, PID), seccomp.NEWEST_SYSCALL, errno.ENOSYS)
    number = NUMBERS[name][architecture.column]
    assert number is not None
    found = decide(program, architecture.audit, number, *arguments)
    if found == ALLOW:
        return "allow"
    assert found & 0xFFFF0000 == ERRNO
    return errno.errorcode[found & 0xFFFF] if found & 0xFFFF else "nothing"


def test_an_assembled_filter_by_hand() -> None:
    """ptrace fails with EPERM (1), fcntl on descriptor 5 or 6 with EBADF (9); numbers above 100 are unknown (38)."""
    rules = [Rule(("ptrace",), 1), Rule(("fcntl",), 9, when=(Argument(0, (5, 6)),))]
    assert assemble(X86, rules, 100, 38) == b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in [
            (0x20, 0, 0, 4),
            (0x15, 1, 0, 0xC000003E),
            (0x06, 0, 0, 0x80000000),
            (0x20, 0, 0, 0),
            (0x25, 0, 1, 100),
            (0x06, 0, 0, 0x00050026),
            (0x15, 0, 1, 101),  # ptrace
            (0x06, 0, 0, 0x00050001),
            (0x15, 0, 6, 72),  # fcntl
            (0x20, 0, 0, 16),
            (0x54, 0, 0, 0xFFFFFFFF),
            (0x15, 2, 0, 5),
            (0x15, 1, 0, 6),
            (0x06, 0, 0, 0x7FFF0000),
            (0x06, 0, 0, 0x00050009),
            (0x06, 0, 0, 0x7FFF0000),
        ]
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("socket", (socket.AF_UNIX, socket.SOCK_STREAM), "allow"),
        ("socket", (socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC), "allow"),
        ("socket", (socket.AF_UNIX, socket.SOCK_DGRAM), "EACCES"),
        ("socket", (socket.AF_INET, socket.SOCK_STREAM), "EACCES"),
        ("socket", (socket.AF_INET6, socket.SOCK_DGRAM), "EACCES"),
        ("socket", (1 << 32 | socket.AF_INET, socket.SOCK_STREAM), "EACCES"),  # the kernel drops the upper half
        ("socketpair", (socket.AF_UNIX, socket.SOCK_STREAM), "allow"),
        ("socketpair", (socket.AF_UNIX, socket.SOCK_DGRAM), "EACCES"),
        ("connect", (3, 0, 0), "EACCES"),
        ("clone", (0x01200011,), "allow"),  # fork
        ("clone", (0x003D0F00,), "allow"),  # pthread_create
        ("clone", (0x10000011,), "EPERM"),  # a user namespace
        ("clone", (0x00020011,), "EPERM"),  # a mount namespace
        ("clone", (0x00008011,), "EPERM"),  # a sibling of its own
        ("clone3", (0, 88), "ENOSYS"),
        ("setsid", (), "nothing"),
        ("setpgid", (0, 0), "nothing"),
        ("fchmodat", (-100, 0, 0o777), "nothing"),
        ("prlimit64", (0, 7), "allow"),
        ("prlimit64", (PID, 7), "EPERM"),
        ("sched_setaffinity", (0, 8), "allow"),
        ("sched_setaffinity", (PID, 8), "nothing"),
        ("setpriority", (0, 0, 5), "allow"),
        ("setpriority", (2, 0, 5), "EPERM"),  # of all of the user's processes
        ("ioprio_set", (1, 0, 0), "allow"),
        ("ioprio_set", (3, 0, 0), "EPERM"),
        ("prctl", (4, 0), "EPERM"),
        ("prctl", (4, 1), "allow"),
        ("prctl", (15, 0), "allow"),
        ("ioctl", (0, 0x5412), "EPERM"),
        ("ioctl", (0, 0x5401), "allow"),
        ("fcntl", (3, 8, PID), "EPERM"),
        ("fcntl", (3, 1), "allow"),
        ("memfd_create", (0, 0), "EPERM"),
        ("ptrace", (16, PID), "EPERM"),
        ("kill", (1, signal.SIGKILL), "allow"),  # Landlock decides
        ("truncate", (0, 0), "allow"),
        ("openat", (-100, 0, 0o1000), "allow"),
    ],
)
def test_what_the_filter_decides(arch: str, name: str, arguments: tuple[int, ...], expected: str) -> None:
    assert verdict(name, *arguments, arch=arch) == expected


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("kill", (0, signal.SIGKILL), "allow"),  # the own group
        ("kill", (PID, 0), "allow"),
        ("kill", (-PID, 0), "allow"),
        ("kill", (-PID & 0xFFFFFFFF, 0), "allow"),
        ("kill", (1, signal.SIGKILL), "EPERM"),
        ("kill", (-1, signal.SIGKILL), "EPERM"),
        ("tgkill", (PID, 5, signal.SIGABRT), "allow"),
        ("tgkill", (1, 1, signal.SIGABRT), "EPERM"),
        ("tkill", (PID, signal.SIGABRT), "EPERM"),
        ("pidfd_send_signal", (3, signal.SIGKILL), "EPERM"),
        ("truncate", (0, 0), "EACCES"),
        ("openat", (-100, 0, 0o1000), "EACCES"),  # O_RDONLY | O_TRUNC
        ("openat", (-100, 0, 0o1101), "allow"),  # O_WRONLY | O_CREAT | O_TRUNC: Landlock decides
        ("openat", (-100, 0, 0), "allow"),
        ("openat2", (-100, 0, 0, 24), "ENOSYS"),
    ],
)
def test_what_it_decides_where_landlock_is_old(arch: str, name: str, arguments: tuple[int, ...], expected: str) -> None:
    assert verdict(name, *arguments, arch=arch, landlock=1) == expected


def test_cuda_may_have_anonymous_files() -> None:
    assert verdict("memfd_create", 0, 0, accelerator=True) == "allow"


@pytest.mark.parametrize(("arch", "other"), [(X86, ARM), (ARM, X86)])
def test_other_numbers(arch: Architecture, other: Architecture) -> None:
    program = assemble(arch, seccomp.rules(7, False, PID), seccomp.NEWEST_SYSCALL, errno.ENOSYS)
    assert decide(program, other.audit, 0) == KILL_PROCESS
    assert decide(program, 0x40000003, 0) == KILL_PROCESS  # 32-bit x86
    assert decide(program, arch.audit, 462) == ALLOW
    assert decide(program, arch.audit, 463) == ERRNO | errno.ENOSYS
    assert decide(program, arch.audit, 0x40000000 | 41) == ERRNO | errno.ENOSYS  # x32, with numbers of its own


def test_filters_fit_into_the_kernel() -> None:
    """It takes 4096 instructions, and jumps of at most 255 past the next."""
    for arch in ARCHITECTURES.values():
        assert len(assemble(arch, seccomp.rules(0, False, 2**22), seccomp.NEWEST_SYSCALL, errno.ENOSYS)) < 8 * 4096


@pytest.mark.parametrize("column", HEADERS)
def test_the_numbers_are_the_kernels(column: int) -> None:
    if not HEADERS[column].exists():
        pytest.skip("the kernel's headers are not installed")
    pattern = r"^#define\s+__NR(?:3264)?_(\w+)\s+(\d+)$"
    found = {name: int(number) for name, number in re.findall(pattern, HEADERS[column].read_text(), re.MULTILINE)}
    known = {name: numbers[column] for name, numbers in NUMBERS.items()}
    newer = {name for name, number in known.items() if number is not None and number > max(found.values())}
    assert {name: number for name, number in known.items() if name not in newer} == {
        name: found.get(name) for name in known if name not in newer
    }
