"""Putting the walls up around the calling process."""

from __future__ import annotations

import os
import sys

from worker.sandbox import landlock, network, privileges, seccomp, tensors
from worker.sandbox.offer import offer
from worker.sandbox.policy import OWN_THREADS, Policy


class SandboxFailed(Exception):
    """A wall that should stand could not be put up."""


def enter(policy: Policy) -> None:
    """Shuts this process in, and with it whatever it starts, for ever. Call it while there is one thread.

    Raises SandboxFailed where a wall that the kernel offers, or that the policy requires, does not stand.
    """
    have = offer(policy.newest_landlock)
    if policy.required and not have.complete:
        raise SandboxFailed(f"the sandbox is required, and {have.sentence()}")
    if sys.platform != "linux":
        return
    if (threads := len(os.listdir("/proc/self/task"))) != 1:
        raise SandboxFailed(f"{threads} threads run already, and walls bind one thread and what it starts later")
    try:
        privileges.drop(keep_reading=have.landlock > 0)
        if policy.accelerator:
            # Kept open: a rule on a folder of /proc holds as long as the kernel remembers the folder.
            os.open(OWN_THREADS, os.O_PATH)
        if have.landlock:
            landlock.restrict(policy.grants(), have.landlock, policy.ranks)
        if have.seccomp:
            seccomp.install(seccomp.rules(have.landlock, policy.accelerator, os.getpid(), policy.ranks))
            network.left_open = policy.ranks
    except OSError as error:
        raise SandboxFailed(f"the kernel refused a wall: {error}") from error
    tensors.share_by_value()
