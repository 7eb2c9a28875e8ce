"""A declarative architecture with its weights in a file of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from app.contract.architecture import Architecture, InputSpec, ModelSpec
from app.contract.errors import ModelRejected
from app.contract.facts import ModelFacts, TensorFacts
from app.contract.layers import Layer
from worker.data.batch import Inputs
from worker.loading.describe import check_finite, check_forward, layer_facts
from worker.loading.feeding.plain import accepted, encoder
from worker.loading.layers import build
from worker.loading.weights import Weights, assign
from worker.model import Dtypes, Model, Save
from worker.objectives.registry import plain_task
from worker.vetting.boundary import first_line
from worker.vetting.demand import EXAMPLES, MAX_SAMPLE_BYTES

MAX_ACTIVATION_BYTES = EXAMPLES * MAX_SAMPLE_BYTES  # of one layer
INPUT = "input"


def load_architecture(spec: ModelSpec, weights: Weights) -> Model:
    """Builds the module on the meta device, so that nothing is allocated before names and shapes are known to fit.

    Raises ModelRejected where the layers do not fit each other, the weights do not fit the layers, a value is not
    finite, or the output is not what the task asks for.
    """
    assert spec.architecture is not None
    assert spec.input is not None
    assert spec.task is not None
    task = plain_task(spec.task)
    module = _build(spec)
    _trace(module, spec.input)
    assign(module, weights.state)
    check_finite(module.state_dict())
    classes = check_forward(
        module,
        spec.task,
        _example(spec.input, 2),
        _example(spec.input, 1),
        None if spec.labels is None else len(spec.labels),
    )
    inputs = (TensorFacts(name=INPUT, shape=spec.input.shape, dtype=spec.input.dtype),)
    facts = ModelFacts(
        format="architecture",
        task=spec.task,
        accepts=accepted(spec.task, inputs),
        inputs=inputs,
        classes=classes,
        labels=spec.labels,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        layers=layer_facts(module),
        native_file=weights.name,
    )

    stored = {name: tensor.dtype for name, tensor in weights.state.items() if tensor.is_floating_point()}

    def saving(casts: Dtypes) -> Save:
        def save(changed: nn.Module, folder: Path) -> Path:
            # What torch adds to old checkpoints (the counters of BatchNorm) does not go back into them.
            state = {name: t for name, t in changed.state_dict().items() if name in weights.state}
            return weights.write(state, folder, casts)

        return save

    plan, encode = ArchitecturePlan(spec, weights), encoder(inputs, _vocabularies(module))
    return Model(module, facts, encode, saving({}), task, stored, saving=saving, plan=plan)


@dataclass(frozen=True)
class ArchitecturePlan:
    """Layers and the file of their weights."""

    spec: ModelSpec
    weights: Weights
    described: Literal["architecture"] = "architecture"

    @property
    def layers(self) -> Sequence[Layer]:
        assert self.spec.architecture is not None
        return self.spec.architecture.layers

    def model(self, architecture: Architecture, state: Mapping[str, Tensor], dtypes: Dtypes | None = None) -> Model:
        """A model of other layers with the same inputs, task and labels, kept in the same kind of file.

        Floats are stored in `dtypes`, or else in that of the upload's where it has one. Raises ModelRejected where the
        layers do not fit each other, with a pointer into the architecture.
        """
        spec = self.spec.model_copy(update={"architecture": architecture})
        floats = {tensor.dtype for tensor in self.weights.state.values() if tensor.is_floating_point()}
        dtype = floats.pop() if len(floats) == 1 else torch.float32
        own = dtypes or {}
        stored = {name: t.to(own.get(name, dtype)) if t.is_floating_point() else t for name, t in state.items()}
        model = load_architecture(spec, replace(self.weights, state=stored))
        return replace(model, spec=spec.model_dump(mode="json", exclude_none=True))

    def begin(self, architecture: Architecture) -> nn.Sequential:
        """The layers with random weights, drawn from torch's generator; vetted before anything is allocated."""
        spec = self.spec.model_copy(update={"architecture": architecture})
        assert spec.input is not None
        _trace(_build(spec), spec.input)
        return build(architecture.layers)


def _build(spec: ModelSpec) -> nn.Sequential:
    assert spec.architecture is not None
    try:
        with torch.device("meta"):
            return build(spec.architecture.layers).eval()
    except Exception as failure:  # torch checks arguments with asserts, ValueErrors and RuntimeErrors alike
        raise ModelRejected(
            f"The architecture cannot be built: {first_line(failure)}", pointer="/architecture/layers"
        ) from failure


def _trace(module: nn.Sequential, spec: InputSpec) -> None:
    """A forward on the meta device: shapes without memory. Raises ModelRejected that names the layer that fails."""
    current = ["", "", ""]

    def before(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            current[:] = [name, type(layer).__name__, str(list(inputs[0].shape)) if inputs else ""]

        return hook

    def after(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.nbytes > MAX_ACTIVATION_BYTES:
            raise MemoryError(
                f"its output {list(output.shape)} takes {output.nbytes} bytes; at most {MAX_ACTIVATION_BYTES} are taken"
            )

    hooks = [layer.register_forward_pre_hook(before(name)) for name, layer in module.named_modules() if name]
    hooks += [layer.register_forward_hook(after) for layer in module.modules()]
    try:
        with torch.no_grad():
            module(torch.zeros(EXAMPLES, *spec.shape, dtype=getattr(torch, spec.dtype), device="meta"))
    except Exception as failure:  # torch checks shapes with errors of many classes
        name, kind, shape = current
        raise ModelRejected(
            f"The architecture does not fit its input: layer {name!r} ({kind}) fails on an input of shape {shape}: "
            f"{first_line(failure)}",
            pointer="/architecture/layers",
        ) from failure
    finally:
        for hook in hooks:
            hook.remove()


def _example(spec: InputSpec, batch: int) -> Inputs:
    """Normal noise, or ones where the input is token ids."""
    generator = torch.Generator().manual_seed(0)
    if spec.dtype == "int64":
        return (torch.ones(batch, *spec.shape, dtype=torch.int64),)
    return (torch.randn(batch, *spec.shape, generator=generator),)


def _vocabularies(module: nn.Sequential) -> dict[str, int]:
    """How many ids the model knows, where its first layer is an embedding."""
    first = next((layer for layer in module.modules() if not list(layer.children())), None)
    return {INPUT: first.num_embeddings} if isinstance(first, nn.Embedding) else {}
