"""`tersor unpack`: a packed artifact becomes a safetensors file, with the very tensors that were packed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from safetensors import TensorSpec, serialize_file

from app.contract.packed import Damaged, Stored, unpack

# What safetensors calls a dtype where it is given one, which is not what it calls it in a file.
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


def unpack_file(path: Path, out: Path, max_bytes: int) -> dict[str, Stored]:
    """Writes `out`, whole or not at all, in a folder that is made where there is none; returns the tensors.

    Raises Damaged, naming the file, and OSError where nothing can be written.
    """
    try:
        tensors = unpack(path.read_bytes(), max_bytes)
    except Damaged as damaged:
        raise Damaged(f"{path}: {damaged.detail}") from None
    specs = {
        name: TensorSpec(
            dtype=_DTYPES[tensor.dtype],
            shape=list(tensor.shape),
            data_ptr=tensor.words.ctypes.data,
            data_len=tensor.nbytes,
        )
        for name, tensor in tensors.items()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".unpack-") as folder:
        whole = Path(folder) / out.name
        whole.touch()  # with the rights of any new file: the library would give it to its owner alone
        rights = whole.stat().st_mode
        serialize_file(specs, whole, {"format": "pt"})
        whole.chmod(rights)
        os.replace(whole, out)
    return tensors
