"""Rules on system calls to the program that the kernel's filter runs: classic BPF on `struct seccomp_data`.

Pure: the same rules give the same bytes, for either architecture and on any machine.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from worker.sandbox.syscalls import NUMBERS

LOAD, AND, EQUAL, GREATER, RETURN = 0x20, 0x54, 0x15, 0x25, 0x06  # on 32-bit words and constants
ALLOW, ERRNO, KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
NUMBER_AT, ARCHITECTURE_AT, ARGUMENTS_AT = 0, 4, 16
ALL_BITS = 0xFFFFFFFF

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, constant."""


@dataclass(frozen=True)
class Architecture:
    """`audit` is its number in the kernel's audit subsystem, `column` its place in the table of system calls."""

    audit: int
    column: int


ARCHITECTURES = {"x86_64": Architecture(0xC000003E, 0), "aarch64": Architecture(0xC00000B7, 1)}


@dataclass(frozen=True)
class Argument:
    """Holds if the low 32 bits of an argument, masked, are one of the values. The kernel reads no more of these."""

    index: int
    values: tuple[int, ...]
    mask: int = ALL_BITS


@dataclass(frozen=True)
class Rule:
    """Calls that fail with `errno`, or do nothing and report success where it is 0.

    With `when`, only if each of these holds; with `unless`, except if each of these holds.
    """

    names: tuple[str, ...]
    errno: int
    when: tuple[Argument, ...] = ()
    unless: tuple[Argument, ...] = ()


def assemble(architecture: Architecture, rules: Iterable[Rule], newest: int, unknown: int) -> bytes:
    """The filter as `struct sock_filter[]`.

    Another architecture's calls end the process: their numbers mean something else. Numbers above `newest` fail with
    the errno `unknown`, so that a kernel newer than the rules opens no door in them.
    """
    program: list[Instruction] = [
        (LOAD, 0, 0, ARCHITECTURE_AT),
        (EQUAL, 1, 0, architecture.audit),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, NUMBER_AT),
        (GREATER, 0, 1, newest),
        (RETURN, 0, 0, ERRNO | unknown),
    ]
    for rule in rules:
        body = _body(rule)
        for name in rule.names:
            number = NUMBERS[name][architecture.column]
            if number is not None:
                program += [(EQUAL, 0, len(body), number), *body]
    program.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _body(rule: Rule) -> list[Instruction]:
    refuse = ERRNO | rule.errno
    if rule.when:
        return _if_all(rule.when, refuse, ALLOW)
    if rule.unless:
        return _if_all(rule.unless, ALLOW, refuse)
    return [(RETURN, 0, 0, refuse)]


def _if_all(arguments: Sequence[Argument], then: int, otherwise: int) -> list[Instruction]:
    body: list[Instruction] = []
    for argument in arguments:
        body += [(LOAD, 0, 0, ARGUMENTS_AT + 8 * argument.index), (AND, 0, 0, argument.mask)]
        after = len(argument.values)  # past the other comparisons and the return that follows them
        body += [(EQUAL, after - i, 0, value & ALL_BITS) for i, value in enumerate(argument.values)]
        body.append((RETURN, 0, 0, otherwise))
    return [*body, (RETURN, 0, 0, then)]
