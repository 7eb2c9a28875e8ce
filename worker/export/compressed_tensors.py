"""A folder of transformers with linear layers in few bits, as the library compressed-tensors describes them: what
transformers and vLLM load.

The format is `pack-quantized`: codes packed into int32 words along the inputs, a step for each group, no zero points.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
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

FORMAT = "pack-quantized"


def export_compressed(module: nn.Module, model: Model, grids: Mapping[str, WeightGrid], path: Path) -> dict[str, int]:
    """Writes `module`, whose weights in `grids` lie on them, as a zip of the model's folder; the bits of each weight
    that is stored in codes.

    Raises ExportFailed where no Linear layer is among them, and for a student that is no model of transformers.
    """
    plan = model.plan
    if not isinstance(plan, ConfigPlan):
        raise ExportFailed("compressed-tensors is a folder of transformers, and the student is none.")
    chosen = {name: grids[name] for name in grids if isinstance(module.get_submodule(_layer(name)), nn.Linear)}
    if not chosen:
        raise ExportFailed("No Linear layer was quantized, and compressed-tensors stores no other in few bits.")
    codes = {
        name: _codes(module.get_parameter(name), grid, model.stored.get(name, torch.float32))
        for name, grid in chosen.items()
    }
    config = plan.folder.config | {"quantization_config": described(module, chosen)}
    originals = {**plan.folder.originals, CONFIG: json.dumps(config, indent=2).encode()}
    with written(plan.folder, module, codes) as weights:
        pack(replace(plan.folder, originals=originals), weights, path)
    return {name: grid.bits for name, grid in chosen.items()}


def described(module: nn.Module, grids: Mapping[str, WeightGrid]) -> dict[str, Any]:
    """The `quantization_config`: the most frequent kind of grid is that of all Linear layers, others name theirs."""
    kinds: dict[tuple[int, int | None], list[str]] = {}
    for name, grid in grids.items():
        group = None if grid.step.shape[1] == 1 else grid.group
        kinds.setdefault((grid.bits, group), []).append(_layer(name))
    ordered = sorted(kinds.items(), key=lambda kind: -len(kind[1]))
    linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if number == 0 else layers,
            "weights": _weights(*kind),
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
        for number, (kind, layers) in enumerate(ordered)
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in linear if f"{name}.weight" not in grids],
        "kv_cache_scheme": None,
    }


def _weights(bits: int, group: int | None) -> dict[str, Any]:
    kind = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    return {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, **kind}


def _codes(weight: Tensor, grid: WeightGrid, dtype: torch.dtype) -> dict[str, Tensor]:
    """What is stored in the weight's place, by what follows its layer's name."""
    codes, _ = grid.unsigned(weight.detach())
    signed = (codes.to(torch.int16) - (1 << grid.bits - 1)).to(torch.int8)
    return {
        "weight_packed": pack_to_int32(signed, grid.bits),
        "weight_scale": grid.step.to(dtype),
        "weight_shape": torch.tensor(weight.shape),
    }


def _layer(name: str) -> str:
    return name.rpartition(".")[0]
