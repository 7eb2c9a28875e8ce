"""The filter on system calls: no network, no reach into other processes, nothing of the kernel's administration.

It also refuses what Landlock does not control: the owner and mode of files, shared memory and semaphores by key,
leaving the process group, and, on kernels whose Landlock is older, truncation and signals.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct
import sys

from worker.sandbox.bpf import ARCHITECTURES, KILL_PROCESS, Argument, Rule, assemble
from worker.sandbox.kernel import syscall

PR_SET_DUMPABLE = 4
SECCOMP = {"x86_64": 317, "aarch64": 277}
SET_MODE_FILTER, GET_ACTION_AVAIL = 1, 2
# Without it, kernels before 5.16 switch off speculation past stores, which costs every computation some speed.
FLAG_SPEC_ALLOW = 4
FLAG_TSYNC = 1  # for every thread of the process, not for the calling one alone

NEWEST_SYSCALL = 462  # mseal, Linux 6.10
NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, …CGROUP, …UTS, …IPC, …USER, …PID, …NET
CLONE_PARENT = 0x00008000
SOCKET_TYPE = 0xF  # the rest of the argument are flags
# ioctls that put words into a terminal's mouth, and that have signals sent to others.
TIOCSTI, TIOCLINUX, FIOSETOWN, SIOCSPGRP = 0x5412, 0x541C, 0x8901, 0x8902
F_SETOWN, F_SETOWN_EX = 8, 15
IOPRIO_WHO_PROCESS = 1
MSG_FASTOPEN = 0x20000000

NETWORK = (
    # Sockets between processes of the job are legal (CUDA opens one), but none may reach out: `connect` cannot be
    # granted by name here, and the worker's host may listen on any (the broker, docker, the fork server).
    Rule(
        ("socket", "socketpair"),
        errno.EACCES,
        unless=(
            Argument(0, (socket.AF_UNIX,)),
            Argument(1, (socket.SOCK_STREAM, socket.SOCK_SEQPACKET), SOCKET_TYPE),
        ),
    ),
    Rule(("connect",), errno.EACCES),
)

# For who has connections of TCP already: they stay as they are. One that was shut down could be turned to another
# address by a send that connects.
CONNECTED = (
    *NETWORK,
    Rule(("bind", "listen", "accept", "accept4"), errno.EACCES),
    Rule(("sendto", "sendmmsg"), errno.EACCES, when=(Argument(3, (MSG_FASTOPEN,), MSG_FASTOPEN),)),
    Rule(("sendmsg",), errno.EACCES, when=(Argument(2, (MSG_FASTOPEN,), MSG_FASTOPEN),)),
)

ALWAYS = (
    # Every process of the job stays in its group, by which it is counted and ended. Libraries that start helpers in
    # a session of their own do not need it: they are told that it worked.
    Rule(("setsid", "setpgid"), 0),
    # Landlock knows nothing of a file's owner, mode and attributes. `shutil.copy` sets the mode: it is told it did.
    Rule(("chmod", "fchmod", "fchmodat", "fchmodat2"), 0),
    Rule(("chown", "lchown", "fchown", "fchownat"), errno.EPERM),
    Rule(
        ("setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr"),
        errno.EPERM,
    ),
    # Other processes: their memory, their files, their limits, their share of the processor, news of their files.
    Rule(("ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "kcmp"), errno.EPERM),
    Rule(("process_madvise", "process_mrelease", "inotify_add_watch", "fanotify_init", "fanotify_mark"), errno.EPERM),
    Rule(("prlimit64", "migrate_pages", "move_pages"), errno.EPERM, unless=(Argument(0, (0,)),)),
    Rule(("sched_setattr", "sched_setparam", "sched_setscheduler"), errno.EPERM, unless=(Argument(0, (0,)),)),
    # onnxruntime pins its threads, by their numbers, and complains where it may not: it is told that it did.
    Rule(("sched_setaffinity",), 0, unless=(Argument(0, (0,)),)),
    Rule(("setpriority",), errno.EPERM, unless=(Argument(0, (os.PRIO_PROCESS,)), Argument(1, (0,)))),
    Rule(("ioprio_set",), errno.EPERM, unless=(Argument(0, (IOPRIO_WHO_PROCESS,)), Argument(1, (0,)))),
    Rule(("fcntl",), errno.EPERM, when=(Argument(1, (F_SETOWN, F_SETOWN_EX)),)),
    Rule(("ioctl",), errno.EPERM, when=(Argument(1, (TIOCSTI, TIOCLINUX, FIOSETOWN, SIOCSPGRP)),)),
    # Memory that outlives the process, or that its supervisor cannot see.
    Rule(("shmget", "shmat", "shmctl", "semget", "semop", "semtimedop", "semctl"), errno.EPERM),
    Rule(("msgget", "msgsnd", "msgrcv", "msgctl", "mq_open", "memfd_secret"), errno.EPERM),
    Rule(("prctl",), errno.EPERM, when=(Argument(0, (PR_SET_DUMPABLE,)), Argument(1, (0,)))),
    # Namespaces and mounts. The flags of clone3 lie behind a pointer: the C library falls back on clone.
    Rule(("clone",), errno.EPERM, unless=(Argument(0, (0,), NEW_NAMESPACES | CLONE_PARENT),)),
    Rule(("clone3",), errno.ENOSYS),
    Rule(("unshare", "setns", "chroot", "pivot_root", "mount", "umount2", "mount_setattr"), errno.EPERM),
    Rule(("move_mount", "open_tree", "fsopen", "fsconfig", "fsmount", "fspick"), errno.EPERM),
    Rule(("open_by_handle_at", "name_to_handle_at"), errno.EPERM),
    # The kernel's larger surfaces and its administration.
    Rule(("io_uring_setup", "io_uring_enter", "io_uring_register", "userfaultfd", "bpf"), errno.EPERM),
    Rule(("perf_event_open", "keyctl", "add_key", "request_key", "modify_ldt", "iopl", "ioperm"), errno.EPERM),
    Rule(("kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module"), errno.EPERM),
    Rule(("reboot", "swapon", "swapoff", "acct", "syslog", "quotactl", "quotactl_fd"), errno.EPERM),
    Rule(("settimeofday", "clock_settime", "clock_adjtime", "adjtimex", "sethostname", "setdomainname"), errno.EPERM),
)

# Landlock before ABI 3 lets anyone truncate what they may read, and the owner whatever there is.
TRUNCATION = (
    Rule(("truncate",), errno.EACCES),
    Rule(("open",), errno.EACCES, when=(Argument(1, (os.O_TRUNC,), os.O_TRUNC | os.O_ACCMODE),)),
    Rule(("openat",), errno.EACCES, when=(Argument(2, (os.O_TRUNC,), os.O_TRUNC | os.O_ACCMODE),)),
    Rule(("openat2",), errno.ENOSYS),  # its flags lie behind a pointer
)

# Anonymous files are memory that belongs to no process's account. CUDA does not start without them.
ANONYMOUS_FILES = (Rule(("memfd_create",), errno.EPERM),)


def signals(pid: int) -> tuple[Rule, ...]:
    """Landlock before ABI 6 lets signals pass: then only to the own group and to process `pid`, the group's first."""
    return (
        Rule(("kill",), errno.EPERM, unless=(Argument(0, (0, pid, -pid)),)),
        Rule(("tgkill",), errno.EPERM, unless=(Argument(0, (pid,)),)),
        Rule(("tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal"), errno.EPERM),
    )


def rules(landlock: int, accelerator: bool, pid: int, network: bool = False) -> tuple[Rule, ...]:
    """Every rule, for a kernel whose Landlock has this ABI (0: none). With `network`, those on sockets come later."""
    chosen: tuple[Rule, ...] = ALWAYS if network else NETWORK + ALWAYS
    if landlock < 3:
        chosen += TRUNCATION
    if landlock < 6:
        chosen += signals(pid)
    return chosen if accelerator else chosen + ANONYMOUS_FILES


def offered() -> bool:
    """Whether this kernel has filters and this module the numbers of its architecture's system calls."""
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        return False
    action = ctypes.create_string_buffer(struct.pack("=I", KILL_PROCESS))
    try:
        syscall(SECCOMP[platform.machine()], GET_ACTION_AVAIL, 0, action)
    except OSError:
        return False
    return True


def install(chosen: tuple[Rule, ...], flags: int = 0) -> None:
    """Binds the calling thread and whatever it starts, for ever. Raises OSError."""
    machine = platform.machine()
    program = assemble(ARCHITECTURES[machine], chosen, NEWEST_SYSCALL, errno.ENOSYS)
    instructions = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: the number of instructions, padding, and where they are.
    filter_ = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions)))
    astray = syscall(SECCOMP[machine], SET_MODE_FILTER, FLAG_SPEC_ALLOW | flags, filter_)
    if astray:
        raise OSError(errno.ESRCH, f"thread {astray} has walls of its own")
