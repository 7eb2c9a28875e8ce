"""Weight sharing: the weights of a layer become the nearest of a few values, which may then be trained."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from app.contract.codebook import Codebook
from worker.constraints import Shared, codebook_of, impose_codebook, stored
from worker.context import Context
from worker.model import Model
from worker.techniques.base import Details
from worker.techniques.pruning.weights import PrunableWeight, WeightSet, prunable, select
from worker.techniques.quantization import codebook_math
from worker.training.finding.settle import settle
from worker.training.loop import train

EVERY = 5  # steps between two assignments that are found again
MOVING_SHARE = 0.75  # of the training, in which they are; the rest is for the entries to settle
_PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def applies(step: Codebook, model: Model) -> str | None:
    """None, or why no weight of the model can have a codebook. Raises InvalidSpec for patterns that match nothing."""
    if step.training is not None and not model.facts.trainable:
        return model.facts.untrainable_reason
    if not prunable(model.module):
        return "The model has no layer whose weights could share values."
    select(model.module, step.exclude)
    return None


def share_values(step: Codebook, context: Context) -> Details:
    """Imposes codebooks on the weights, beside whatever masks they have, and trains the entries."""
    module = context.model.module
    weights = WeightSet(module, _chosen(step, module))
    for number, weight in enumerate(weights.weights):
        _impose(step, weights, weight, np.random.default_rng([context.seed, number]))
    found: Details = {}
    if step.training is not None:
        training, found = settle(context, step.training)
        hook = Reassigning(step, weights) if step.assignment == "reestimated" else None
        found |= train(context, training, hook).details()
        if hook is not None:
            hook.finish()
    _round(step, weights)
    return {"layers": [_row(weight) for weight in weights.weights]} | found


def _chosen(step: Codebook, module: nn.Module) -> list[PrunableWeight]:
    """The weights, and the biases of their layers where those are to share values too."""
    weights = select(module, step.exclude)
    if not step.biases:
        return weights
    biases = [
        PrunableWeight(weight.layer, f"{weight.layer}.bias".lstrip("."), weight.owner, "bias")
        for weight in weights
        if weight.attribute == "weight" and isinstance(getattr(weight.owner, "bias", None), Tensor)
    ]
    return weights + biases


class Reassigning:
    """The loop's hook that finds again which of the entries, as they are by then, each weight is nearest to."""

    def __init__(self, step: Codebook, weights: WeightSet) -> None:
        self._step, self._weights = step, weights
        for weight in weights.weights:
            _own(weight).straight = True

    def __call__(self, step: int, total: int) -> bool:
        """Assigns where that is due; true once weights keep their entries."""
        moving = step < MOVING_SHARE * total
        if step and step % EVERY == 0 and moving:
            for weight in self._weights.weights:
                self._reassign(weight)
        if not moving:
            self.finish()
        return not moving

    def finish(self) -> None:
        """From here on weights keep their entries."""
        for weight in self._weights.weights:
            _own(weight).straight = False

    def _reassign(self, weight: PrunableWeight) -> None:
        own = _own(weight)
        kept = own.codes > 0
        latent = stored(weight.owner, weight.attribute).detach()
        for group in _groups(weight, self._step.groups):
            chosen = group & kept
            if not chosen.any():
                continue
            used = torch.unique(own.codes[chosen]).long()
            values, entries = _numpy(latent[chosen]), _numpy(own.entries.detach()[used])
            price = self._step.entropy_weight * float(values.var())
            shares = np.array([float((own.codes[chosen] == code).float().mean()) for code in used])
            codes = codebook_math.assign(values, entries, shares, price)
            own.codes[chosen] = used[torch.from_numpy(codes)].to(own.codes)


def _impose(step: Codebook, weights: WeightSet, weight: PrunableWeight, random: np.random.Generator) -> None:
    value = weight.value()
    kept = WeightSet(weights.module, [weight]).kept()[0]
    if value.ndim < 2:
        kept = kept & (value != 0)  # of neurons that are dead
    codes = torch.zeros(value.shape, dtype=torch.int32, device=value.device)
    entries: list[float] = []
    for group in _groups(weight, step.groups):
        chosen = group & kept
        if not chosen.any():
            continue
        found, own = codebook_math.shared(_numpy(value[chosen]), step.entries, step.start, step.entropy_weight, random)
        codes[chosen] = torch.from_numpy(found + 1 + len(entries)).to(codes)
        entries += own.tolist()
    impose_codebook(weights.module, weight.name, codes, torch.tensor(entries, dtype=value.dtype))


def _groups(weight: PrunableWeight, count: int) -> list[Tensor]:
    """Which elements each codebook is for, by outputs; a layer with fewer outputs has as many codebooks as those."""
    value = weight.value()
    if value.ndim < 2:
        return [torch.ones_like(value, dtype=torch.bool)]  # biases share one
    rows = weight.by_output(value).shape[0]
    groups = []
    for part in torch.arange(rows, device=value.device).tensor_split(min(count, rows)):
        mask = torch.zeros_like(value, dtype=torch.bool)
        weight.by_output(mask)[part] = True
        groups.append(mask)
    return groups


def _round(step: Codebook, weights: WeightSet) -> None:
    """Entries, biases and norms to what the precision holds."""
    dtype = _PRECISIONS[step.precision]
    if dtype == torch.float32:
        return
    rounded = [_own(weight).entries for weight in weights.weights]
    rounded += [parameter for parameter in weights.module.parameters() if parameter.ndim < 2]
    with torch.no_grad():
        for parameter in rounded:
            parameter.copy_(parameter.to(dtype))


def _own(weight: PrunableWeight) -> Shared:
    own = codebook_of(weight.owner, weight.attribute)
    assert own is not None
    return own


def _numpy(values: Tensor) -> codebook_math.Floats:
    found: codebook_math.Floats = values.detach().cpu().double().numpy()
    return found


def _row(weight: PrunableWeight) -> dict[str, float | int | str | None]:
    codes = _own(weight).codes
    coded = codes[codes > 0].cpu().numpy().astype(np.intp)
    return {
        "name": weight.name,
        "weights": codes.numel(),
        "coded": len(coded),
        "entries": len(np.unique(coded)),
        "bits_a_code": codebook_math.entropy(coded) if len(coded) else 0.0,
    }
