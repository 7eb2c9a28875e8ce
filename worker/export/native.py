"""The upload's own format: the weights as they now are, with what earlier steps imposed on them baked in."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from worker.model import Model


def export_native(module: nn.Module, model: Model, folder: Path) -> Path:
    """Writes `module`, free of parametrizations, as the upload's loader reads it again; returns the file.

    In the dtypes that a step asked for, where the format can, else in the upload's.
    """
    save = model.saving(model.casts) if model.casts and model.saving is not None else model.save
    return save(module.cpu().eval(), folder)
