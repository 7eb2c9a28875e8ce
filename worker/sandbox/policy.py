"""What a child may touch, and how that follows from where the interpreter and the attempt lie."""

from __future__ import annotations

import inspect
import os
import site
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from app.settings import Settings
from worker.sandbox.landlock import NEWEST, Access

READ = Access.READ_FILE | Access.READ_DIR
RUN = READ | Access.EXECUTE
WRITE = (
    READ
    | Access.WRITE_FILE
    | Access.TRUNCATE
    | Access.REFER
    | Access.MAKE_REG
    | Access.MAKE_DIR
    | Access.MAKE_SYM
    | Access.MAKE_SOCK
    | Access.REMOVE_FILE
    | Access.REMOVE_DIR
)
USE = Access.READ_FILE | Access.WRITE_FILE | Access.TRUNCATE | Access.IOCTL_DEV
# Without READ_DIR: the names there, other jobs' among them, are not to be seen.
SHARE = Access.READ_FILE | Access.WRITE_FILE | Access.TRUNCATE | Access.MAKE_REG | Access.REMOVE_FILE

SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/nix/store")
# Of /etc, what libraries read at their start. Not the accounts, not the hosts, no keys.
CONFIGURATION = (
    *("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime", "/etc/timezone"),
    *("/etc/locale.alias", "/etc/mime.types", "/etc/os-release", "/etc/ssl/openssl.cnf", "/etc/pki/tls/openssl.cnf"),
    *("/etc/crypto-policies", "/etc/OpenCL"),
)
# The processor, the devices and the limits of the container, by which libraries choose how to compute. Of other
# processes, /proc shows what it shows to every user: Landlock refuses their memory, environment and files.
MACHINE = ("/proc", "/sys/devices", "/sys/class", "/sys/bus", "/sys/fs/cgroup", "/sys/kernel/mm")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where the C library keeps named semaphores and shared memory

# NVIDIA's and AMD's drivers, and WSL's; which of them are there says whether there is an accelerator.
ACCELERATOR_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
ACCELERATOR_DEVICES = ("nvidia*", "nvidia-caps/*", "kfd", "dri", "dxg")
ACCELERATOR_SYSTEM = ("/sys/module", "/run/nvidia-persistenced")
OWN_THREADS = Path("/proc/self/task")

# Of an installed Python; the folder itself may hold more than Python. Some systems keep the second kind elsewhere.
INSTALLATION = ("bin", "lib", "lib32", "lib64", "libexec", "include", "share", "pyvenv.cfg")
INSTALLED = ("stdlib", "platstdlib", "purelib", "platlib", "include", "platinclude")

OWN_CODE = (Path(inspect.getfile(Settings)).parent, Path(__file__).parents[1])  # the packages app and worker


@dataclass(frozen=True)
class Policy:
    """What one child may touch. There is no network in it.

    `inputs` are read and never executed or changed; `scratch` is the one folder to write to. `shared_memory` opens
    /dev/shm, for pools of processes. `accelerator` leaves CUDA what it does not start without. A kernel that lacks
    Landlock or filters does what it can, or refuses where `required`. `newest_landlock` imitates an older kernel.
    `ranks` is for a job of several processes: the network stays open until they are connected to each other, which is
    before any of them touches an upload, and closes then (`network.close`).
    """

    inputs: Path
    scratch: Path
    readable: tuple[Path, ...]
    listable: tuple[Path, ...] = ()
    shared_memory: bool = False
    accelerator: bool = False
    required: bool = False
    newest_landlock: int = NEWEST
    ranks: bool = False

    def grants(self) -> Iterator[tuple[Path, Access]]:
        """Every path with what may be done at and below it."""
        yield self.inputs, READ
        yield self.scratch, WRITE
        yield from ((path, RUN) for path in self.readable)
        yield from ((path, Access.READ_DIR) for path in self.listable)
        yield from ((Path(name), RUN) for name in SYSTEM)
        yield from ((Path(name), READ) for name in (*CONFIGURATION, *MACHINE))
        yield from ((Path(name), USE) for name in DEVICES)
        if self.shared_memory:
            yield SHARED_MEMORY, SHARE
        if self.accelerator:
            for name in ACCELERATOR_DEVICES:
                yield from ((path, USE | Access.READ_DIR) for path in Path("/dev").glob(name))
            yield from ((Path(name), READ) for name in ACCELERATOR_SYSTEM)
            # CUDA names its threads through their files and takes a refusal for a failure.
            yield OWN_THREADS, Access.WRITE_FILE | Access.TRUNCATE


def policy_for(
    settings: Settings, attempt: Path, scratch: Path, shared_memory: bool, ranks: bool = False
) -> Policy | None:
    """The policy of a child whose inputs lie in `attempt` and which writes to `scratch`; None where it is off."""
    if settings.sandbox == "off":
        return None
    return Policy(
        inputs=attempt,
        scratch=scratch,
        readable=(*interpreter(), *settings.readable_folders),
        listable=source_roots(),
        shared_memory=shared_memory,
        accelerator=has_accelerator(),
        required=settings.sandbox == "require",
        ranks=ranks,
    )


def has_accelerator() -> bool:
    """Whether this machine has a device that jobs compute on."""
    return any(Path(name).exists() for name in ACCELERATOR_FILES)


@cache
def interpreter() -> tuple[Path, ...]:
    """The folders of this interpreter and its packages, and of this product's own code."""
    prefixes = {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}
    found = {Path(prefix, name) for prefix in prefixes for name in INSTALLATION}
    found |= {Path(sysconfig.get_path(kind)) for kind in INSTALLED} | {Path(name) for name in site.getsitepackages()}
    if site.ENABLE_USER_SITE:
        found.add(Path(site.getusersitepackages()))
    # An installation in place keeps what `importlib.metadata` reads, the version for one, beside the packages.
    found |= {path for root in source_roots() for path in root.glob("*.egg-info")}
    return tuple(sorted(path for path in {*found, *OWN_CODE} if path.exists()))


def source_roots() -> tuple[Path, ...]:
    """Where this product's packages are found by name; below it, the names alone may be read."""
    return tuple(sorted({folder.parent for folder in OWN_CODE}))


def exposed(settings: Settings) -> list[Path]:
    """Which folders of the service's own lie where every job may read."""
    open_to_all = (*interpreter(), *map(Path, SYSTEM), *settings.readable_folders)
    readable = [Path(os.path.realpath(path)) for path in open_to_all]
    return [
        folder
        for folder in settings.own_folders
        if any(Path(os.path.realpath(folder)).is_relative_to(path) for path in readable)
    ]
