"""The smallest file: the weights as they are stored, entropy-coded (docs/packed.md)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from app.contract.errors import ExportFailed
from app.contract.packed import Sizes
from worker.model import Model
from worker.packed import packed


def export_packed(module: nn.Module, model: Model, path: Path) -> Sizes:
    """Writes the state dict of `module`, which has no parametrizations, as they are stored.

    Raises ExportFailed for a tensor that cannot be packed.
    """
    try:
        data, sizes = packed(stored_state(module, model))
    except ValueError as error:
        raise ExportFailed(f"The model cannot be packed: {error}. Export native instead.") from error
    path.write_bytes(data)
    return sizes


def stored_state(module: nn.Module, model: Model) -> dict[str, Tensor]:
    """The tensors of a module by name, in the dtypes that they are stored in."""
    dtypes = model.dtypes
    return {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in module.state_dict().items()}
