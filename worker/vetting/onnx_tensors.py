"""The tensors of an ONNX file: as many bytes as their shapes say, and external ones read out of the archive by us.

A tensor may name a file that its bytes lie in. ONNX Runtime would open that file wherever the name leads, and follows
links; so no name is ever handed on. It has to be that of a member of the uploaded archive, whose bytes are put into the
tensor here.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

from onnx import TensorProto, helper

from app.contract.errors import TersorError
from worker.vetting.archive import Member

MAX_DIMENSIONS = 16
# Tied weights may lie in the same bytes; more tensors than this over one file would be made of nothing.
MAX_SHARING = 4
# By data type: bytes an element, and the field that holds elements where `raw_data` does not.
_TYPES: dict[int, tuple[int, str]] = {
    TensorProto.FLOAT: (4, "float_data"),
    TensorProto.DOUBLE: (8, "double_data"),
    TensorProto.FLOAT16: (2, "int32_data"),
    TensorProto.BFLOAT16: (2, "int32_data"),
    TensorProto.INT8: (1, "int32_data"),
    TensorProto.UINT8: (1, "int32_data"),
    TensorProto.INT16: (2, "int32_data"),
    TensorProto.UINT16: (2, "int32_data"),
    TensorProto.BOOL: (1, "int32_data"),
    TensorProto.INT32: (4, "int32_data"),
    TensorProto.INT64: (8, "int64_data"),
    TensorProto.UINT32: (4, "uint64_data"),
    TensorProto.UINT64: (8, "uint64_data"),
}
_FIELDS = ("float_data", "double_data", "int32_data", "int64_data", "uint64_data", "string_data")


class External:
    """The archive's members as files of data: `members` by their name beside the .onnx file."""

    def __init__(self, members: Mapping[str, Member], folder: Path) -> None:
        self._members = members
        self._folder = folder
        self._files: dict[str, Path] = {}
        self._taken = 0

    def read(self, location: str, start: int, length: int, error: type[TersorError]) -> bytes:
        """That stretch of a member. Raises `error` where there is no such member or stretch."""
        member = self._members.get(location)
        if member is None:
            raise error(
                f"The model wants its weights from the file {location[:200]!r}, which is not in the archive. Pack it "
                "beside the .onnx file, under the name that the model gives it."
            )
        if start < 0 or length < 0 or start + length > member.size:
            raise error(
                f"The model wants bytes {start} to {start + length} of {location!r}, which has {member.size} bytes."
            )
        self._taken += length
        if self._taken > MAX_SHARING * sum(member.size for member in self._members.values()):
            raise error("The model's tensors are larger than the files that hold them.")
        with self._file(location, member).open("rb") as stream:
            stream.seek(start)
            return stream.read(length)

    def _file(self, location: str, member: Member) -> Path:
        """The member as a fresh file of a name of ours."""
        if location not in self._files:
            path = self._folder / f"data-{len(self._files)}"
            member.extract(path)
            self._files[location] = path
        return self._files[location]


def check_tensor(tensor: TensorProto, external: External | None, error: type[TersorError]) -> int:
    """How many bytes the tensor holds; external ones are put into it. Raises `error` where they are not as declared."""
    name = tensor.name[:200]
    if tensor.data_type not in _TYPES:
        raise error(
            f"Tensor {name!r} is of type {_type_name(tensor.data_type)}; floating point, integers and bool are taken. "
            "Upload the model before quantization, without tensors of text."
        )
    if len(tensor.dims) > MAX_DIMENSIONS or min(tensor.dims, default=0) < 0 or tensor.HasField("segment"):
        raise error(f"Tensor {name!r} has the impossible shape {list(tensor.dims)[: MAX_DIMENSIONS + 1]}.")
    size, field = _TYPES[tensor.data_type]
    needed = prod(tensor.dims) * size
    if tensor.data_location == TensorProto.EXTERNAL:
        _fetch(tensor, needed, external, error)
    elif tensor.external_data:
        raise error(f"Tensor {name!r} has its bytes inside the file and names another file as well.")
    filled = [other for other in _FIELDS if len(getattr(tensor, other))]
    if tensor.HasField("raw_data"):
        filled.append("raw_data")
        came = len(tensor.raw_data)
    else:
        came = len(getattr(tensor, field)) * size
    if len(filled) > 1 or filled not in ([], ["raw_data"], [field]) or came != needed:
        raise error(
            f"Tensor {name!r} of shape {list(tensor.dims)} needs {needed} bytes in one field; {came} came. "
            "The file is damaged: export it again."
        )
    return needed


def _fetch(tensor: TensorProto, needed: int, external: External | None, error: type[TersorError]) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if external is None:
        raise error(
            f"The model's weights lie in another file ({location[:200]!r}), which did not come with it. Upload a zip "
            "or tar of the .onnx file and its data files, or save it as one file: "
            "onnx.save_model(onnx.load('model.onnx'), 'one.onnx', save_as_external_data=False)."
        )
    parts = location.split("/")
    if not location or location.startswith("/") or "\\" in location or ":" in location or {"", ".", ".."} & {*parts}:
        raise error(
            f"Tensor {tensor.name[:200]!r} wants its bytes from {location[:200]!r}. Only a plain relative name of a "
            "file in the archive is taken: no absolute path, no '..', no drive."
        )
    start, length = (_number(entries.get(key, default)) for key, default in (("offset", "0"), ("length", str(needed))))
    if start is None or length != needed:
        raise error(
            f"Tensor {tensor.name[:200]!r} of shape {list(tensor.dims)} needs {needed} bytes; the file says offset "
            f"{entries.get('offset', '0')[:30]!r} and length {entries.get('length', '')[:30]!r} in {location!r}."
        )
    content = external.read(location, start, needed, error)
    del tensor.external_data[:]
    tensor.data_location = TensorProto.DEFAULT
    tensor.raw_data = content


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _type_name(data_type: int) -> str:
    try:
        return str(helper.tensor_dtype_to_string(data_type)).removeprefix("TensorProto.")
    except KeyError:
        return str(data_type)
