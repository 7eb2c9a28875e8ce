"""Arrays in .npz and .safetensors: read by index as they were written, never unpickled."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from app.contract.errors import DatasetRejected
from tests.worker.loading.files import Bomb, zipped
from worker.data import open_data
from worker.data.arrays import ArraySplit
from worker.data.base import Data

X = np.random.default_rng(0).standard_normal((6, 1, 3, 2)).astype(np.float32)
Y = np.array([3, 1, 2, 0, 3, 1])


def npz(compress: bool = False, **arrays: Any) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def opened(content: bytes, folder: Path, name: str = "data") -> Data:
    path = folder / name
    path.write_bytes(content)
    return open_data(path, name, {}, folder)


CONTAINERS = {
    "npz": npz,
    "compressed npz": lambda **arrays: npz(True, **arrays),
    "safetensors": lambda **arrays: save(arrays),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_samples_are_read_by_index(tmp_path: Path, container: str) -> None:
    content = CONTAINERS[container](train_inputs=X, train_targets=Y, calibration_inputs=X[:2])
    data = opened(content, tmp_path)
    assert data.facts.kind == "arrays"
    train = data.facts.splits["train"]
    assert (train.samples, train.has_targets, train.target_min, train.target_max) == (6, True, 0, 3)
    assert (train.inputs[0].name, train.inputs[0].shape, train.inputs[0].dtype) == ("input", (1, 3, 2), "float32")
    assert list(data.splits) == ["train", "calibration"]
    batch = data.splits["train"].read([5, 0, 5])
    assert isinstance(batch.inputs, dict)
    assert np.array_equal(batch.inputs["input"].numpy(), X[[5, 0, 5]])
    assert batch.targets is not None
    assert batch.targets.dtype == torch.int64
    assert batch.targets.tolist() == [1, 3, 1]
    assert data.splits["calibration"].read([1]).targets is None


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_floats_are_values(tmp_path: Path, container: str, dtype: Any, shape: tuple[int, ...]) -> None:
    values = (np.arange(6 * int(np.prod(shape))).reshape(6, *shape) / 4).astype(dtype)
    data = opened(CONTAINERS[container](val_inputs=X, val_targets=values), tmp_path)
    facts = data.facts.splits["validation"]
    assert (facts.targets, facts.target_shape, facts.binary) == ("values", shape, False)
    assert (facts.target_min, facts.target_max) == (None, None)
    targets = data.splits["validation"].read([4, 1]).targets
    assert isinstance(targets, torch.Tensor)
    assert targets.dtype == torch.float32
    assert np.array_equal(targets.numpy(), values[[4, 1]])


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float32])
def test_zeros_and_ones_are_several_labels_at_once(tmp_path: Path, container: str, dtype: Any) -> None:
    labels = (np.arange(18).reshape(6, 3) % 2).astype(dtype)
    data = opened(CONTAINERS[container](train_inputs=X, train_targets=labels), tmp_path)
    facts = data.facts.splits["train"]
    assert (facts.targets, facts.target_shape, facts.binary) == ("values", (3,), True)
    targets = data.splits["train"].read([3]).targets
    assert isinstance(targets, torch.Tensor)
    assert (targets.dtype, targets.tolist()) == (torch.float32, [[1.0, 0.0, 1.0]])


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_number_a_step_is_tags(tmp_path: Path, container: str) -> None:
    tags = IDS % 5
    tags[:, 0] = -100
    data = opened(CONTAINERS[container](train_inputs=IDS, train_targets=tags), tmp_path)
    facts = data.facts.splits["train"]
    assert (facts.targets, facts.target_min, facts.target_max) == ("tags", 0, 4)
    targets = data.splits["train"].read([2, 0]).targets
    assert isinstance(targets, list)
    assert [own.tolist() for own in targets] == [[-100, 4, 0, 1], [-100, 1, 2, 3]]
    assert targets[0].dtype == torch.int64


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8", "|u1", "|i1", ">i2", "<u4", "<i8"])
def test_every_numeric_dtype_and_byte_order(tmp_path: Path, dtype: str) -> None:
    values = np.arange(12).reshape(4, 3).astype(dtype)
    batch = opened(npz(train_inputs=values), tmp_path).splits["train"].read([3, 1])
    assert isinstance(batch.inputs, dict)
    assert batch.inputs["input"].tolist() == [[9, 10, 11], [3, 4, 5]]


def test_fortran_order_is_understood(tmp_path: Path) -> None:
    values = np.arange(24.0).reshape(4, 3, 2)
    batch = opened(npz(train_inputs=np.asfortranarray(values)), tmp_path).splits["train"].read([2])
    assert isinstance(batch.inputs, dict)
    assert np.array_equal(batch.inputs["input"].numpy(), values[[2]])


def test_several_inputs_have_names(tmp_path: Path) -> None:
    arrays = {"test_inputs.input_ids": Y[:, None], "test_inputs.attention_mask": Y[:, None] * 0, "test_targets": Y}
    data = opened(npz(**arrays), tmp_path)
    assert {tensor.name for tensor in data.facts.splits["test"].inputs} == {"input_ids", "attention_mask"}
    batch = data.splits["test"].read([0])
    assert isinstance(batch.inputs, dict)
    assert batch.inputs["input_ids"].tolist() == [[3]]


@pytest.mark.parametrize("container", ["npz", "safetensors"])
def test_arrays_stay_in_the_file(tmp_path: Path, container: str) -> None:
    split = opened(CONTAINERS[container](train_inputs=X, train_targets=Y), tmp_path).splits["train"]
    assert isinstance(split, ArraySplit)
    assert isinstance(split.inputs["input"], np.memmap)


IDS = np.arange(24).reshape(6, 4)
NAN = X.copy()
NAN[4, 0, 1, 1] = np.inf


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"inputs": X, "targets": Y}, "array '(inputs|targets)'.*<split>_inputs"),
        ({"x_train": X}, "array 'x_train'"),
        ({"train_targets": Y}, "no `train_inputs`"),
        ({"train_inputs": X, "train_targets": Y[:4]}, "'train' has 6 inputs and 4 targets"),
        ({"train_inputs.a": X, "train_inputs.b": X[:4]}, "6 and 4 samples"),
        ({"train_inputs": X, "train_targets": np.float32(3)}, "`train_targets` is float32"),
        ({"train_inputs": X, "train_targets": NAN}, "`train_targets` holds NaN or infinity, first in sample 4"),
        ({"train_inputs": X, "train_targets": np.zeros((6, 0), np.float32)}, "`train_targets` is float32"),
        ({"train_inputs": X, "train_targets": np.full((6, 2), 2, np.uint8)}, "`train_targets` is uint8"),
        ({"train_inputs": X, "train_targets": np.ones(6, bool)}, "`train_targets` is bool"),
        ({"train_inputs": IDS, "train_targets": IDS - 5}, "`train_targets` holds -5; tags start at 0"),
        ({"train_inputs": IDS, "train_targets": IDS[:, :3]}, "`train_targets` is int64"),
        ({"val_inputs": X, "dev_inputs": X}, "'(val|dev)' and '(val|dev)' both mean"),
        ({"train_inputs": X, "train_targets": np.eye(6, 4, dtype=np.int64)}, r"one-hot rows: \.argmax"),
        ({"train_inputs": NAN}, "infinity, first in sample 4"),
        ({"train_inputs": X[:0]}, "no samples"),
        ({"train_inputs": np.float32(3)}, "no samples"),
    ],
)
@pytest.mark.parametrize("container", ["npz", "safetensors"])
def test_arrays_that_do_not_fit_are_named(tmp_path: Path, container: str, arrays: dict[str, Any], words: str) -> None:
    with pytest.raises(DatasetRejected, match=words):
        opened(CONTAINERS[container](**{name: np.asarray(array) for name, array in arrays.items()}), tmp_path)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array(["a", "b"]), "dtype <U1"),
        (np.array([1 + 2j]), "complex128"),
        (np.array([True]), "bool"),
        (np.zeros(2, dtype=[("a", "f4")]), "dtype"),
        (np.array(["2020-01-01"], dtype="M8[D]"), "datetime64"),
    ],
)
def test_arrays_that_are_no_numbers_are_refused(tmp_path: Path, array: Any, words: str) -> None:
    with pytest.raises(DatasetRejected, match=words):
        opened(npz(train_inputs=array), tmp_path)


def test_object_arrays_are_refused_and_never_unpickled(tmp_path: Path) -> None:
    content = npz(train_inputs=np.array([Bomb(tmp_path / "executed")], dtype=object))
    with pytest.raises(DatasetRejected, match="dtype object"):
        opened(content, tmp_path)
    assert not (tmp_path / "executed").exists()


def header(text: str, data: bytes = b"", version: int = 1) -> bytes:
    size = 2 if version == 1 else 4
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(size, "little") + text.encode() + data


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not an array", "no NumPy array"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000,), }"), "needs 4000000000 bytes"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }"), "of shape \\[-1\\] needs"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -1), }", b"1234"), "of shape"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", b"12345678"), "needs 4 bytes; 8 came"),
        (header("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"), "dtype object"),
        (header("__import__('os').system('true')"), "no NumPy array"),
        (header("(" * 5000), "no NumPy array"),
        (
            header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'1, ' * 40}), }}", b"1234"),
            "has 40 dimensions",
        ),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", version=9), "no NumPy array"),
        (header(" " * 50_000), "no NumPy array"),
        (b"\x93NUMPY\x01\x00", "no NumPy array"),
    ],
)
def test_hostile_headers_are_refused_before_anything_is_unpacked(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(DatasetRejected, match=words):
        opened(zipped({"train_inputs.npy": content}), tmp_path)


def test_a_damaged_array_is_named(tmp_path: Path) -> None:
    content = bytearray(npz(train_inputs=X))
    content[content.index(X.tobytes()) + 7] ^= 255
    with pytest.raises(DatasetRejected, match=r"'train_inputs\.npy' is damaged"):
        opened(bytes(content), tmp_path)


def test_the_spec_of_a_dataset_is_strict(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(npz(train_inputs=X))
    with pytest.raises(DatasetRejected, match=r"spec\.colour"):
        open_data(path, "data", {"colour": "red"}, tmp_path)


def test_an_empty_npz_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    zipfile.ZipFile(buffer, "w").close()
    with pytest.raises(DatasetRejected, match="holds no pictures, sounds, text or Parquet"):
        opened(buffer.getvalue(), tmp_path)
