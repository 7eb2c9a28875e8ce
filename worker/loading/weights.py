"""Plain weights: a state dict out of a safetensors file or a torch.save file, and back into the same container."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from app.contract.errors import ModelRejected
from worker.loading.advice import PYTORCH, WEIGHTS
from worker.model import Dtypes
from worker.vetting.boundary import first_line
from worker.vetting.safetensors import read_header

SAFETENSORS, TORCH = "model.safetensors", "model.pt"
# Where training scripts put a state dict inside a checkpoint.
_WRAPPERS = ("state_dict", "model_state_dict")
# Tied weights are stored once and named twice; more than this is a small storage posing as a large tensor.
MAX_SHARING = 4
SLACK_BYTES = 1 << 20


@dataclass(frozen=True)
class Weights:
    """A state dict as it came, and how one is written into the same container: `store` returns the file `name`."""

    name: str
    state: dict[str, Tensor]
    store: Callable[[dict[str, Tensor], Path], Path]

    def write(self, new: Mapping[str, Tensor], folder: Path, casts: Dtypes | None = None) -> Path:
        """Contiguous, in the dtypes that came: a float16 upload must not come back twice as large. Or in `casts`."""
        casts = casts or {}
        return self.store(
            {
                name: tensor.detach().cpu().to(casts.get(name, self._dtype(name, tensor)), copy=True).contiguous()
                for name, tensor in new.items()
            },
            folder,
        )

    def _dtype(self, name: str, tensor: Tensor) -> torch.dtype:
        return self.state[name].dtype if name in self.state else tensor.dtype


def read_safetensors(path: Path) -> Weights:
    """Raises ModelRejected where the header is not sound."""
    header = read_header(path, ModelRejected)
    with safe_open(str(path), framework="pt") as file:
        state = {name: file.get_tensor(name) for name in header.entries}

    def store(new: dict[str, Tensor], folder: Path) -> Path:
        target = folder / SAFETENSORS
        save_file(new, target, metadata=header.metadata or None)
        return target

    return Weights(SAFETENSORS, state, store)


def read_torch(path: Path) -> Weights:
    """Reads a state dict written by torch.save, without running code. Raises ModelRejected for everything else."""
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _check_stored(path)
    loaded = _unpickle(path, zipped=zipped)
    wrapper = next((key for key in _WRAPPERS if isinstance(loaded, dict) and isinstance(loaded.get(key), dict)), None)
    state = _vetted(loaded if wrapper is None else loaded[wrapper], path.stat().st_size)

    def store(new: dict[str, Tensor], folder: Path) -> Path:
        target = folder / TORCH
        torch.save(new if wrapper is None else {wrapper: new}, target)
        return target

    return Weights(TORCH, state, store)


def assign(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts a state dict into a module that stands on the meta device; floats become float32.

    Raises ModelRejected, with the first names at fault, unless names and shapes agree.
    """
    wanted = module.state_dict()
    optional = {name for name in wanted if name.endswith("num_batches_tracked")}  # absent in old checkpoints
    _check_names(wanted, state, optional)
    ready = {}
    for name, place in wanted.items():
        tensor = state.get(name)
        if tensor is None:
            ready[name] = torch.zeros(place.shape, dtype=place.dtype)
        elif tensor.is_floating_point() != place.is_floating_point():
            raise ModelRejected(
                f"Tensor {name!r} is {_word(tensor)}; expected {_word(place)}. Upload the weights before quantization."
            )
        else:
            ready[name] = tensor.to(dtype=place.dtype, copy=True).contiguous()
    module.load_state_dict(ready, assign=True)


def _check_names(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], optional: set[str]) -> None:
    missing = [name for name in wanted if name not in state and name not in optional]
    unexpected = [name for name in state if name not in wanted]
    if missing or unexpected:
        parts = [
            f"{word} {', '.join(map(repr, names[:4]))}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
            for word, names in (("lacks", missing), ("has the unexpected", unexpected))
            if names
        ]
        raise ModelRejected(
            f"The weights do not fit the architecture: the file {' and '.join(parts)}. Names follow the nesting of "
            "the layers as in torch.nn.Sequential, '0.weight' for the first layer."
        )
    for name, place in wanted.items():
        if name in state and state[name].shape != place.shape:
            raise ModelRejected(
                f"Tensor {name!r} has the shape {list(state[name].shape)}; "
                f"the architecture expects {list(place.shape)}."
            )


def _check_stored(path: Path) -> None:
    """torch.save compresses nothing, so a compressed entry can only be there to unpack into too much."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise ModelRejected(f"{info.filename!r} is compressed, which torch.save never does. {WEIGHTS}")


def _unpickle(path: Path, *, zipped: bool) -> Any:
    # torch goes by the name alone: a path that ends so would be read as safetensors, a stream has no name.
    misnamed = path.suffix == ".safetensors"
    try:
        with warnings.catch_warnings(), path.open("rb") as stream:
            warnings.simplefilter("ignore")  # about storages of old versions
            source: Any = stream if misnamed else path
            return torch.load(source, map_location="cpu", weights_only=True, mmap=zipped and not misnamed)
    except pickle.UnpicklingError as failure:
        raise ModelRejected(
            "The file holds pickled objects beyond tensors (a whole module?), which would run code when read. "
            f"{PYTORCH}"
        ) from failure
    except Exception as failure:  # torch raises whatever its C++ parts throw
        raise ModelRejected(
            f"The file was written by torch.save but is damaged or cut short ({first_line(failure)}). Save it again."
        ) from failure


def _vetted(value: Any, size: int) -> dict[str, Tensor]:
    if not isinstance(value, dict) or not value:
        raise ModelRejected(f"The file holds {type(value).__name__}, not a state dict of tensors. {WEIGHTS}")
    for name, tensor in value.items():
        if not isinstance(name, str) or type(tensor) not in (Tensor, nn.Parameter):
            raise ModelRejected(f"Entry {str(name)[:80]!r} is {type(tensor).__name__}, not a plain tensor. {WEIGHTS}")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu" or tensor.is_complex():
            raise ModelRejected(
                f"Tensor {name!r} is {_word(tensor)}, no dense real tensor. Upload the weights before quantization."
            )
    if sum(tensor.nbytes for tensor in value.values()) > MAX_SHARING * size + SLACK_BYTES:
        raise ModelRejected("The tensors are larger than the file that holds them: call .contiguous() before saving.")
    return {name: tensor.detach() for name, tensor in value.items()}


def _word(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {str(tensor.layout).removeprefix('torch.')}"
