"""Which walls this machine's kernel has on offer, in words that an operator reads."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass

from worker.sandbox import landlock, seccomp


@dataclass(frozen=True)
class Offer:
    """`landlock` is the ABI, 0 for none; `seccomp` whether there are filters for this processor."""

    landlock: int
    seccomp: bool

    @property
    def complete(self) -> bool:
        """Whether every wall can stand. What an older Landlock lacks, the filter makes up for."""
        return self.landlock > 0 and self.seccomp

    def sentence(self) -> str:
        """What holds, and what is missing."""
        if self.complete:
            return f"on (Landlock ABI {self.landlock}, seccomp)"
        missing = []
        if not self.landlock:
            missing.append("no Landlock (Linux 5.13 or newer, among the kernel's security modules)")
        if not self.seccomp:
            missing.append("no system call filters for this kernel and processor")
        kernel = f"{platform.system()} {platform.release()} on {platform.machine()}"
        return f"incomplete: {kernel} has {' and '.join(missing)}"


def offer(newest_landlock: int = landlock.NEWEST) -> Offer:
    """Asks the kernel; at most this Landlock ABI."""
    if sys.platform != "linux":
        return Offer(0, False)
    return Offer(min(landlock.abi(), newest_landlock), seccomp.offered())
