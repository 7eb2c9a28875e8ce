"""The upload's own format: the weights as they now are, with what earlier steps imposed on them baked in."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from worker.model import Model


def export_native(module: nn.Module, model: Model, folder: Path) -> Path:
    """Writes `module`, free of parametrizations, as the upload's loader reads it again; returns the file."""
    return model.save(module.cpu().eval(), folder)
