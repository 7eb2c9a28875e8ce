"""The precision that a training computes in. Weights, optimizers and evaluations are float32 in every case."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from app.contract.errors import Unsupported
from app.contract.optimizing import Precision


def dtype_of(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype that forward and backward passes are cast to.

    auto is bf16 where the device has instructions for it, else float32. On a CPU with AVX512-BF16, one thread, steps of
    LeNet, ResNet-18, an LSTM, an MLP and a small BERT were 1.3 to 2.4 times as fast in bf16. Raises Unsupported for
    fp16 anywhere but on CUDA.
    """
    match precision:
        case "float32":
            return torch.float32
        case "bf16":
            return torch.bfloat16
        case "fp16":
            if device.type != "cuda":
                raise Unsupported("precision fp16 needs a CUDA device, and this worker has none. Use bf16 or auto.")
            return torch.float16
        case "auto":
            return torch.bfloat16 if _computes_bf16(device) else torch.float32


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Around a forward pass and its loss."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def scaler(dtype: torch.dtype, device: torch.device) -> torch.amp.GradScaler:
    """Keeps the gradients of fp16 above its smallest numbers; does nothing for the others."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
