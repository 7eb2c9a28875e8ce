"""A folder of transformers with linear layers in few bits, as the library compressed-tensors describes them: what
transformers and vLLM load.

Whole numbers are `pack-quantized`: codes packed into int32 words along the inputs, a step for each group, no zero
points. float8 is `float-quantized`: a tensor of that type, and a scale for each output.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor, nn

from app.contract.errors import ExportFailed
from worker.loading.folder import CONFIG, pack
from worker.loading.huggingface import ConfigPlan, written
from worker.model import Model
from worker.techniques.quantization.weight_grid import WeightGrid


@dataclass(frozen=True)
class Kind:
    """How weights are stored; `group` is that of their scales, None for one an output."""

    format: str
    type: str
    bits: int
    group: int | None = None


FLOAT8 = Kind("float-quantized", "float", 8)


def export_compressed(
    module: nn.Module, model: Model, grids: Mapping[str, WeightGrid], scales: Mapping[str, Tensor], path: Path
) -> dict[str, int]:
    """Writes `module`, whose weights in `grids` lie on them, or in `scales` are float8 times those, as a zip of the
    model's folder; the bits of each weight that is stored in codes.

    Raises ExportFailed where no Linear layer is among them, and for a student that is no model of transformers.
    """
    plan = model.plan
    if not isinstance(plan, ConfigPlan):
        raise ExportFailed("compressed-tensors is a folder of transformers, and the student is none.")
    chosen = [name for name in (*grids, *scales) if isinstance(module.get_submodule(_layer(name)), nn.Linear)]
    if not chosen:
        raise ExportFailed("No Linear layer was quantized, and compressed-tensors stores no other in few bits.")
    codes, kinds = {}, {}
    for name in chosen:
        weight, dtype = module.get_parameter(name).detach(), model.stored.get(name, torch.float32)
        codes[name] = _codes(weight, grids[name], dtype) if name in grids else _float8(weight, scales[name], dtype)
        kinds[name] = _kind(grids[name]) if name in grids else FLOAT8
    config = plan.folder.config | {"quantization_config": described(module, kinds)}
    originals = {**plan.folder.originals, CONFIG: json.dumps(config, indent=2).encode()}
    with written(plan.folder, module, codes) as weights:
        pack(replace(plan.folder, originals=originals), weights, path)
    return {name: kind.bits for name, kind in kinds.items()}


def described(module: nn.Module, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """The `quantization_config`: the most frequent kind is that of all Linear layers, others name theirs."""
    layers: dict[Kind, list[str]] = {}
    for name, kind in kinds.items():
        layers.setdefault(kind, []).append(_layer(name))
    ordered = sorted(layers.items(), key=lambda own: -len(own[1]))
    linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if number == 0 else names,
            "weights": _weights(kind),
            "input_activations": None,
            "output_activations": None,
            "format": kind.format,
        }
        for number, (kind, names) in enumerate(ordered)
    }
    return {
        "quant_method": "compressed-tensors",
        "format": ordered[0][0].format,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in linear if f"{name}.weight" not in kinds],
        "kv_cache_scheme": None,
    }


def _kind(grid: WeightGrid) -> Kind:
    return Kind("pack-quantized", "int", grid.bits, None if grid.step.shape[1] == 1 else grid.group)


def _weights(kind: Kind) -> dict[str, Any]:
    own = {"strategy": "channel"} if kind.group is None else {"strategy": "group", "group_size": kind.group}
    return {"num_bits": kind.bits, "type": kind.type, "symmetric": True, "dynamic": False, **own}


def _float8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Codes under the weight's own name, and scales [outputs, 1]."""
    return {"weight": (weight.float() / scale).to(torch.float8_e4m3fn), "weight_scale": scale.to(dtype)}


def _codes(weight: Tensor, grid: WeightGrid, dtype: torch.dtype) -> dict[str, Tensor]:
    """What is stored in the weight's place, by what follows its layer's name."""
    codes, _ = grid.unsigned(weight)
    signed = (codes.to(torch.int16) - (1 << grid.bits - 1)).to(torch.int8)
    return {
        "weight_packed": pack_to_int32(signed, grid.bits),
        "weight_scale": grid.step.to(dtype),
        "weight_shape": torch.tensor(weight.shape),
    }


def _layer(name: str) -> str:
    return name.rpartition(".")[0]
