"""The files of a Hugging Face folder: which are taken, that none holds code, and how the folder is packed again."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.contract.errors import ModelRejected
from worker.vetting.archive import Archive
from worker.vetting.safetensors import Header, read_header

MAX_JSON_BYTES = 64 << 20  # a tokenizer.json with 250,000 tokens has 17 MB
MAX_LAYERS = 1000  # that a config may ask for
MAX_PICTURE = 4096  # pixels along a side that a preprocessor may ask for
_SUFFIXES = (".json", ".txt", ".model", ".md", ".jinja")
_PICKLES = re.compile(r"(pytorch_model.*\.(bin|pt)|.*\.(bin|pkl|pickle|pt|pth|ckpt))$")
_COUNTS = re.compile(r"(^|_)(n_layers?|num_.*layers|depths?|num_.*blocks)$")
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?$")

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
QUANTIZED = "quantization_config"
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
# Of sentence-transformers.
MODULES = "modules.json"
POOLING = "1_Pooling/config.json"
SENTENCE_CONFIG = "sentence_bert_config.json"
_NESTED = re.compile(r"\d_[A-Za-z]{1,40}/config\.json$")
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# What the libraries get to see; other small files are only packed again.
_SEEN = frozenset(
    {CONFIG, INDEX, PREPROCESSOR, PROCESSOR, TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json"}
    | {"added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "normalizer.json"}
)


@dataclass(frozen=True)
class Folder:
    """An unpacked folder at `path`. `originals` are the small files as they came, for packing them again."""

    path: Path
    config: dict[str, Any]
    originals: Mapping[str, bytes]
    headers: tuple[Header, ...]

    @property
    def numbers(self) -> int:
        """Elements of all tensors in the files."""
        return sum(_elements(header) for header in self.headers)

    @property
    def float_dtype(self) -> str:
        """The floating dtype, in safetensors' words, that most of the weights have."""
        sizes: dict[str, int] = {}
        for header in self.headers:
            for entry in header.entries.values():
                if entry.dtype in ("F16", "BF16", "F32", "F64"):
                    sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.end - entry.start
        return max(sizes, key=lambda dtype: sizes[dtype], default="F32")

    def has(self, name: str) -> bool:
        return name in self.originals


def unpack(archive: Archive, path: Path, quantized: bool = False) -> Folder:
    """Writes the files that a model needs to the new folder `path`, under their own vetted names.

    Raises ModelRejected for code, for pickled weights without safetensors, for a config that is none, and, unless
    `quantized`, for one that says that the weights are codes.
    """
    path.mkdir()
    members = {name: member for name, member in archive.members.items() if "/" not in name}
    if CONFIG not in members:
        raise ModelRejected(
            "The archive holds no config.json at its root or in its single folder: pack what save_pretrained wrote. "
            f"It holds {', '.join(map(repr, list(archive.members)[:5])) or 'nothing'}."
        )
    if code := next((name for name in archive.members if name.endswith(".py")), None):
        raise ModelRejected(f"The folder holds code ({code!r}), which is never run. Use a model of transformers' own.")
    _check_weights(list(members))
    originals = {}
    for name, member in members.items():
        if name.endswith(".safetensors"):
            if WEIGHTS.match(name):
                member.extract(path / name)
        elif name.endswith(_SUFFIXES):
            originals[name] = member.read(MAX_JSON_BYTES, ModelRejected)
            if name in _SEEN:
                (path / name).write_bytes(_without_paths(name, originals[name]))
    for name, member in archive.members.items():
        if _NESTED.match(name):
            originals[name] = member.read(MAX_JSON_BYTES, ModelRejected)
    if INDEX in originals:
        _check_index(_json(INDEX, originals[INDEX]), members)
    config = _json(CONFIG, originals[CONFIG])
    _check_config({key: value for key, value in config.items() if not (quantized and key == QUANTIZED)})
    files = sorted(path.glob("*.safetensors"))
    headers = tuple(read_header(file, ModelRejected, float8=quantized) for file in files)
    return Folder(path, config, originals, headers)


def describe(config: dict[str, Any], path: Path) -> Folder:
    """A folder at `path` that holds weights alone, with a config from elsewhere; vetted as if it had come along."""
    content = json.dumps(config).encode()
    (path / CONFIG).write_bytes(_without_paths(CONFIG, content))
    _check_config(config)
    headers = tuple(read_header(file, ModelRejected) for file in sorted(path.glob("*.safetensors")))
    return Folder(path, config, {CONFIG: content}, headers)


def vetted_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config as the libraries get to see it. Raises ModelRejected as `unpack` does."""
    _check_config(config)
    return _json(CONFIG, _without_paths(CONFIG, json.dumps(config).encode()))


def repeated(folder: Folder, config: dict[str, Any], weights: Path, path: Path) -> Folder:
    """The small files of a folder at the new folder `path`, with another config and the weight files of `weights`."""
    path.mkdir()
    for file in folder.path.iterdir():
        if file.name in _SEEN - {INDEX}:
            shutil.copyfile(file, path / file.name)
    for file in weights.iterdir():
        if WEIGHTS.match(file.name):
            shutil.copyfile(file, path / file.name)
    (path / CONFIG).write_text(json.dumps(vetted_config(config)))
    kept = {name: content for name, content in folder.originals.items() if not WEIGHTS.match(name)}
    headers = tuple(read_header(file, ModelRejected) for file in sorted(path.glob("*.safetensors")))
    return Folder(path, config, {**kept, CONFIG: json.dumps(config, indent=2).encode()}, headers)


def pack(folder: Folder, weights: Path, target: Path) -> Path:
    """Writes a zip of the folder with the weight files of `weights` in place of its own; returns `target`.

    Deflated, because pruned weights are mostly zeros: stored, a folder would stay as large as it came. Times are fixed,
    so that the same weights give the same bytes.
    """
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(folder.originals.items()):
            if not WEIGHTS.match(name):
                archive.writestr(_entry(name), content)
        for file in sorted(weights.iterdir()):
            if WEIGHTS.match(file.name):
                with file.open("rb") as source, archive.open(_entry(file.name), "w", force_zip64=True) as output:
                    while block := source.read(1 << 20):
                        output.write(block)
    return target


def _entry(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = 0o644 << 16
    return info


def _elements(header: Header) -> int:
    total = 0
    for entry in header.entries.values():
        count = 1
        for size in entry.shape:
            count *= size
        total += count
    return total


def _check_weights(names: list[str]) -> None:
    if any(WEIGHTS.match(name) for name in names if name.endswith(".safetensors")):
        return
    if pickled := next((name for name in names if _PICKLES.match(name)), None):
        raise ModelRejected(
            f"The folder's weights are pickled ({pickled!r}), which runs code when read. Save it again with "
            "model.save_pretrained(folder, safe_serialization=True)."
        )
    raise ModelRejected(
        "The folder holds no model.safetensors. Save it with model.save_pretrained(folder, safe_serialization=True)."
    )


def _check_index(index: dict[str, Any], members: Mapping[str, object]) -> None:
    """Raises ModelRejected unless every shard that the index names came with it."""
    shards = index.get("weight_map")
    for shard in set(shards.values()) if isinstance(shards, dict) else {None}:
        if not isinstance(shard, str) or shard not in members or not WEIGHTS.match(shard):
            raise ModelRejected(f"{INDEX!r} names the file {str(shard)[:80]!r}, which is not in the folder.")


def _json(name: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as failure:
        raise ModelRejected(f"{name!r} in the folder is no JSON.") from failure
    if not isinstance(value, dict):
        raise ModelRejected(f"{name!r} in the folder is no JSON object.")
    return value


def _check_config(config: dict[str, Any]) -> None:
    if QUANTIZED in config:
        raise ModelRejected("config.json says that the weights are quantized already: upload the original ones.")
    for key, value in config.items():
        values = value if isinstance(value, list) else [value]
        if _COUNTS.search(key) and sum(v for v in values if isinstance(v, int)) > MAX_LAYERS:
            raise ModelRejected(f"config.json asks for {key} = {value!r}; at most {MAX_LAYERS} layers are taken.")


def _without_paths(name: str, content: bytes) -> bytes:
    """A file as the libraries get to see it. Raises ModelRejected where it names code or an absurd picture size.

    Keys that name files or kernels elsewhere are left out: libraries would open them.
    """
    if name not in (CONFIG, PREPROCESSOR, PROCESSOR, TOKENIZER_CONFIG):
        return content
    value = _json(name, content)
    parts = [value, *(part for part in value.values() if isinstance(part, dict))]
    if any("auto_map" in part or "custom_pipelines" in part for part in parts):
        raise ModelRejected(
            f"{name!r} points to code of its own (auto_map), which is never run. Use a model of transformers' own."
        )
    if name in (PREPROCESSOR, PROCESSOR):
        for part in parts:
            _check_sizes(part)
    kept = {k: v for k, v in value.items() if not (k.endswith(("_file", "name_or_path")) or "_implementation" in k)}
    kept.pop("chat_template", None)  # a template is a program
    return json.dumps(kept).encode()


def _check_sizes(preprocessor: dict[str, Any]) -> None:
    for key in ("size", "crop_size", "pad_size"):
        value = preprocessor.get(key)
        for size in value.values() if isinstance(value, dict) else (value,):
            if isinstance(size, int | float) and not 0 < size <= MAX_PICTURE:
                raise ModelRejected(f"{PREPROCESSOR!r} asks for {key} = {value!r}; at most {MAX_PICTURE} is taken.")
