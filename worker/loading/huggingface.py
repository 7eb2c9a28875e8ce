"""A Hugging Face folder in an archive: any model of transformers' own code, offline, without remote code."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from app.contract.architecture import ModelSpec
from app.contract.errors import ModelRejected
from app.contract.facts import ModelFacts
from worker.export.quiet import hushed
from worker.loading.describe import check_finite, check_forward, layer_facts
from worker.loading.folder import CONFIG, QUANTIZED, Folder, pack, repeated, unpack, vetted_config
from worker.loading.transformers_kinds import KINDS, Answer, Kind, answer_of, is_sentence_transformer, problem
from worker.model import Dtypes, Model, Save
from worker.vetting.archive import open_archive
from worker.vetting.boundary import first_line

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
# Tied weights are stored once; a config that describes more than this of what the files hold would be made of noise.
MAX_TIES = 4
NATIVE = "model.zip"

transformers_logging.disable_progress_bar()


def load_huggingface(path: Path, spec: ModelSpec, scratch: Path) -> Model:
    """Loads a model of any of `KINDS`; unpacks to a new folder under `scratch`.

    Raises ModelRejected for code, pickles, unknown model types, weights that do not fit the config, and for outputs
    that are not what the task asks for.
    """
    folder = _unpacked(path, scratch, quantized=False)
    return ConfigPlan(folder, spec, NATIVE, _saver).read(folder)


def load_compressed(path: Path, spec: ModelSpec, scratch: Path) -> Model:
    """Loads what the exporter of compressed-tensors wrote, as transformers does, and the way it is loaded by default:
    to floats. Not for uploads."""
    folder = _unpacked(path, scratch, quantized=True)
    with contextlib.redirect_stderr(io.StringIO()):  # its library draws progress bars
        model = model_of(folder, spec, NATIVE, _saver(folder, {}))  # runs it once, whereupon the codes become floats
    stored = dict(model.stored)
    for name, layer in model.module.named_modules():
        if hasattr(layer, "weight_scale"):
            for attribute in ("weight_scale", "weight_shape", "weight_zero_point"):
                layer._parameters.pop(attribute, None)
            stored[f"{name}.weight"] = _DTYPES[folder.float_dtype]
    model = replace(model, stored=stored)
    model.round_as_stored(model.module)  # they would be, had they been loaded in their own dtype
    return model


def _unpacked(path: Path, scratch: Path, quantized: bool) -> Folder:
    work = Path(tempfile.mkdtemp(prefix="huggingface-", dir=scratch))
    archive = open_archive(path, work, ModelRejected)
    try:
        return unpack(archive, work / "model", quantized)
    finally:
        archive.close()


@dataclass(frozen=True)
class ConfigPlan:
    """A folder of transformers; `saver` gives how a module of a folder is written as the file `name`, with tensors in
    other dtypes than those that came."""

    folder: Folder
    spec: ModelSpec
    name: str
    saver: Callable[[Folder, Dtypes], Save]
    described: Literal["config"] = "config"

    def read(self, folder: Folder) -> Model:
        """The model of a folder."""
        saving = functools.partial(self.saver, folder)
        model = model_of(folder, self.spec, self.name, saving({}))
        return replace(model, saving=saving, plan=replace(self, folder=folder))

    def begin(self, config: dict[str, Any], device: str = "cpu") -> Any:
        """The network that a config describes, with random weights from torch's generator, vetted as an upload's.

        Raises ModelRejected for a config that transformers cannot build, or that describes more than the folder holds.
        """
        vetted = vetted_config(config)
        kind = getattr(transformers, _kind(replace(self.folder, config=vetted), self.spec)[1])
        with _quiet():
            made = kind.config_class.from_dict(vetted)
            _check_numbers(kind, made, self.folder)
            with torch.device(device):
                return kind(made).eval()

    def model(self, config: dict[str, Any], module: Any, dtypes: Dtypes | None = None) -> Model:
        """A model of another config, with the same tokenizer or processor, kept in the same kind of file, in `dtypes`
        or else in those that came."""
        path = Path(tempfile.mkdtemp(prefix="student-", dir=self.folder.path.parent)) / "model"
        with written(self.folder, module, casts=dtypes) as weights:
            folder = repeated(self.folder, config, weights, path)
        model = self.read(folder)
        if self.spec.config is None:
            return model
        spec = self.spec.model_copy(update={"config": config})
        return replace(model, spec=spec.model_dump(mode="json", exclude_none=True))


def model_of(folder: Folder, spec: ModelSpec, name: str, save: Save) -> Model:
    """The model of an unpacked folder, written back by `save` as the file `name`."""
    kind, class_name = _kind(folder, spec)
    with _quiet():
        module = _load(folder, class_name)
        task = (kind.labelled and problem(module.config)) or kind.task
        if spec.task not in (None, task):
            raise ModelRejected(
                f"The spec's task is {spec.task}; the model is a {class_name} for {task}.", pointer="/task"
            )
        feeding = kind.feed(folder, module)
    _positional(module, tuple(tensor.name for tensor in feeding.inputs), answer_of(kind, folder))
    labels = spec.labels or (_labels(module.config) if kind.labelled else None)
    facts = ModelFacts(
        format="huggingface",
        task=task,
        accepts=feeding.accepts,
        inputs=feeding.inputs,
        classes=0,
        labels=labels,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        layers=layer_facts(module),
        native_file=name,
    )
    model = Model(module, facts, feeding.encode, save, feeding.task, _stored(folder, module), feeding.example_length)
    return replace(model, facts=facts.model_copy(update={"classes": _check(model)}))


def _kind(folder: Folder, spec: ModelSpec) -> tuple[Kind, str]:
    """What the class of transformers that a config names is for."""
    architectures, model_type = folder.config.get("architectures"), folder.config.get("model_type")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(name, str) or not isinstance(model_type, str):
        raise ModelRejected("config.json needs `architectures` and `model_type`, as save_pretrained writes them.")
    fitting = [kind for kind in KINDS if kind.has(name, model_type)]
    if not fitting:
        raise ModelRejected(
            f"{name[:80]!r} of model_type {model_type[:80]!r} is no model of transformers {transformers.__version__} "
            f"for any of these tasks: {', '.join(dict.fromkeys(kind.task for kind in KINDS))}."
        )
    chosen = next((kind for kind in fitting if kind.task == spec.task), fitting[0])
    if chosen.task == "sentence-embedding" and spec.task is None and not is_sentence_transformer(folder):
        raise ModelRejected(
            f"{name!r} has no head, and the folder no modules.json of sentence-transformers: give the spec "
            '{"task": "sentence-embedding"} to have the mean of its states, or upload a model with a head.',
            pointer="/task",
        )
    return chosen, name


def _load(folder: Folder, name: str) -> Any:
    kind = getattr(transformers, name)
    config = kind.config_class.from_pretrained(folder.path, local_files_only=True)
    if QUANTIZED not in folder.config:  # else it holds words of several numbers
        _check_numbers(kind, config, folder)
    module, info = kind.from_pretrained(
        folder.path,
        config=config,
        local_files_only=True,
        use_safetensors=True,
        dtype=torch.float32,
        attn_implementation="sdpa" if getattr(kind, "_supports_sdpa", False) else "eager",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in `info`, for a sentence of our own
    )
    if mismatched := sorted(map(str, info["mismatched_keys"])):
        raise ModelRejected(f"The weights do not fit config.json: {mismatched[0]}.")
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise ModelRejected(f"The weights lack {', '.join(map(repr, missing[:4]))}{more}, which config.json describes.")
    check_finite(module.state_dict())
    return module.eval()


def _check_numbers(kind: Any, config: Any, folder: Folder) -> None:
    """Builds the model on the meta device first: a config alone can ask for any amount of memory."""
    try:
        with torch.device("meta"):
            described = sum(parameter.numel() for parameter in kind(config).parameters())
    except Exception as failure:  # classes of transformers raise errors of every class
        raise ModelRejected(
            f"transformers {transformers.__version__} cannot build the model that config.json describes: "
            f"{first_line(failure)}. Save it again with save_pretrained."
        ) from failure
    if described > MAX_TIES * folder.numbers:
        raise ModelRejected(
            f"config.json describes {described} parameters and the weight files hold {folder.numbers} numbers: they "
            "do not belong together."
        )


def _positional(module: Any, names: tuple[str, ...], answer: Answer) -> None:
    """Makes `module(*inputs)` give one tensor, in place: names of layers and `save_pretrained` stay as they are."""
    kind = type(module)

    class Positional(kind):  # type: ignore[misc, valid-type]  # the class is known only now
        def forward(self, *inputs: Tensor) -> Tensor:
            named = dict(zip(names, inputs, strict=True))
            return answer(super().forward(**named), named)

    Positional.__name__ = kind.__name__
    Positional.__qualname__ = kind.__qualname__
    module.__class__ = Positional


def _labels(config: Any) -> tuple[str, ...]:
    return tuple(str(config.id2label[i]) for i in range(config.num_labels))


def _check(model: Model) -> int:
    labels = model.facts.labels
    try:
        return check_forward(
            model.module,
            model.facts.task,
            model.example(2),
            model.example(1),
            None if labels is None else len(labels),
        )
    except ModelRejected:
        raise
    except Exception as failure:  # models raise errors of every class
        raise ModelRejected(f"The model fails on a plain input: {first_line(failure)}") from failure


def _stored(folder: Folder, module: nn.Module) -> dict[str, torch.dtype]:
    """The dtype in which `_saver` writes each floating tensor: its own, or, where transformers gives it another name
    than the file, that of most."""
    own = {name: entry.dtype for header in folder.headers for name, entry in header.entries.items()}
    state = module.state_dict().items()
    dtypes = {name: _DTYPES.get(own.get(name, ""), _DTYPES[folder.float_dtype]) for name, _ in state}
    return {name: dtypes[name] for name, tensor in state if tensor.is_floating_point()}


def _saver(folder: Folder, casts: Dtypes) -> Save:
    def save(module: nn.Module, target: Path) -> Path:
        """A zip of the folder with new weights."""
        originals = folder.originals
        if casts:
            config = _told(folder.config, set((_stored(folder, module) | dict(casts)).values()))
            originals = {**originals, CONFIG: json.dumps(config, indent=2).encode()}
        with written(folder, module, casts=casts) as weights:
            return pack(replace(folder, originals=originals), weights, target / NATIVE)

    return save


def _told(config: dict[str, Any], dtypes: set[torch.dtype]) -> dict[str, Any]:
    """A config that says what its floats are stored in, which is what transformers makes of them unless told otherwise:
    float32 where they differ, so that none is rounded again."""
    dtype = str(dtypes.pop() if len(dtypes) == 1 else torch.float32).removeprefix("torch.")
    old = "torch_dtype"  # what transformers 4 calls it
    parts = {key: _told(part, {getattr(torch, dtype)}) for key, part in config.items() if _says_dtype(part)}
    return config | parts | {old if old in config else "dtype": dtype}


def _says_dtype(part: Any) -> bool:
    return isinstance(part, dict) and bool(part.keys() & {"dtype", "torch_dtype"})


@contextlib.contextmanager
def written(
    folder: Folder,
    module: nn.Module,
    codes: Mapping[str, Mapping[str, Tensor]] | None = None,
    casts: Dtypes | None = None,
) -> Iterator[Path]:
    """A folder with the weights, in the dtypes that came: float16 must not come back twice as large. Or in `casts`.

    `codes` are tensors that are written in the place of a weight, by its name and by their own beside it.
    """
    codes = codes or {}
    dtypes = _stored(folder, module) | dict(casts or {})
    state = {
        name: tensor.detach().cpu().to(dtypes.get(name, tensor.dtype))
        for name, tensor in module.state_dict().items()
        if name not in codes
    }
    for name, tensors in codes.items():
        state |= {f"{name.rpartition('.')[0]}.{own}": tensor for own, tensor in tensors.items()}
    with tempfile.TemporaryDirectory(prefix="save-", dir=folder.path.parent) as name, _quiet():
        module.save_pretrained(name, state_dict=state)  # type: ignore[operator]  # transformers' own module
        yield Path(name)


def _quiet() -> AbstractContextManager[None]:
    """transformers reports at length what is checked here anyway."""
    return hushed("transformers", logging.ERROR)
