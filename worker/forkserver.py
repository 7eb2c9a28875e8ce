"""The fork server: a process with torch in memory and no secrets, from which a child starts in milliseconds."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

# What a child may know of the environment: where programs and libraries are, and how these are to compute. Everything
# else stays outside, since nobody can list the names under which people keep credentials.
HARMLESS = frozenset(
    ("PATH", "LANG", "LANGUAGE", "TZ", "SHELL", "TERM", "USER", "LOGNAME", "HOME", "VIRTUAL_ENV", "CC", "CXX", "CFLAGS")
)
HARMLESS_PREFIXES = (
    *("LC_", "PYTHON", "LD_", "CONDA_PREFIX", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "DNNL_"),
    *("ONEDNN_", "TORCH", "PYTORCH_", "TRITON_", "ORT_", "TOKENIZERS_", "TRANSFORMERS_", "HF_HUB_OFFLINE", "CUDA_"),
    *("CUDNN_", "CUBLAS_", "NVIDIA_", "NCCL_", "HIP_", "ROCR_", "HSA_", "MALLOC_", "GLIBC_"),
)


def context(preload: str = "worker.preload") -> ForkServerContext:
    """The multiprocessing context whose children come from the fork server."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload([preload])
    return made


def warm(made: ForkServerContext, preload: str = "worker.preload") -> None:
    """Returns once a child has started and ended, so that the first job does not wait for the imports.

    Raises ImportError where the preload cannot be imported: the fork server alone would swallow it and every child
    would be slow. Call it while the process has one thread: the environment is without secrets for a moment.
    """
    with _no_secrets():
        forkserver.ensure_running()
    child = made.Process(target=importlib.import_module, args=(preload,))
    child.start()
    child.join()
    if child.exitcode:
        raise ImportError(f"{preload} cannot be imported; the traceback above says why")


def scrub_environment() -> dict[str, str]:
    """Removes what may be a secret from the environment of this process, and gives what was removed."""
    return {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name not in HARMLESS and not name.startswith(HARMLESS_PREFIXES)
    }


@contextmanager
def _no_secrets() -> Iterator[None]:
    removed = scrub_environment()
    try:
        yield
    finally:
        os.environ.update(removed)
