"""The compress step: rounds of pruning, training, sharing values and packing, as long as the metric holds."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from app.contract.augmentable import movable
from app.contract.augmentation import Augmentation, Crop
from app.contract.codebook import Codebook
from app.contract.compression import Compress
from app.contract.pruning import NORMALIZING, Criterion, Prune
from app.contract.training import Settled, Training
from worker.checkpoints.points import Parts, load_state
from worker.constraints import baked
from worker.context import Context
from worker.evaluation.judging import Judge
from worker.export.packed import stored_state
from worker.model import Model
from worker.packed import packed
from worker.structure.edits import Edit
from worker.structure.restructured import retake, take
from worker.techniques.base import Details
from worker.techniques.compression.attempt import Attempt, Snapshot, cloned, restore, snapshot
from worker.techniques.compression.narrowing import Narrowing, narrowing, rewritable
from worker.techniques.pruning.dead import drop_dead
from worker.techniques.pruning.noise import noisy
from worker.techniques.pruning.prune import PruneTechnique
from worker.techniques.pruning.weights import WeightSet, select
from worker.techniques.quantization.quantize import QuantizeTechnique
from worker.techniques.structure.limits import had, remaining
from worker.training.finding.settle import settle
from worker.training.randomness import random_state
from worker.training.states import mask_state, module_state

MANY = 0.2  # share of the weights that it does not take much to choose
DEAD_SAMPLES = 8192  # that a weight has to have no effect on to go
ENTROPY_WEIGHT = 0.02  # variances of the weights that a bit is worth
CODED_RATE = 0.4  # of the learning rate, for values that are shared
GENTLE_RATE = 0.1  # where a network holds before its values are shared, and not behind that
MARGIN_BYTES = 1.5  # times as many bytes are worth it to hold by the margin
LEAST = 1e-9  # share of the weights to go, where as few are left as are to be kept
PROBED = 0.05  # share of the weights with which the learning rate is found


class CompressTechnique:
    """Lowers the bytes of the packed artifact until the metric would fall."""

    name: ClassVar[str] = "compress"

    def applies(self, step: Compress, model: Model) -> str | None:
        """What prune applies to, where it can be trained. Raises InvalidSpec as prune does."""
        return PruneTechnique().applies(Prune(sparsity=0.5, exclude=step.exclude, training=step.training), model)

    def apply(self, step: Compress, context: Context) -> Details:
        """Leaves the last state that held in the module; the uploaded one where none did."""
        return _Search(step, context).run()


@dataclass
class _Place:
    """How far the search is. `keep` is the share of weights that the next round keeps; first it goes down in large
    steps, and then, `fine`, in smaller ones from the best that held. `firm`: that one held by the margin."""

    keep: float
    factor: float
    number: int = 0
    failures: int = 0
    held: float | None = None
    size: int | None = None
    firm: bool = False
    fine: bool = False
    done: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)

    def better(self, size: int, firm: bool) -> bool:
        """Whether a round that holds, with so many bytes, is better than the best so far."""
        if self.size is None:
            return True
        own, best = size * (1.0 if firm else MARGIN_BYTES), self.size * (1.0 if self.firm else MARGIN_BYTES)
        return own < best


@dataclass
class _Units:
    """Which units have left the network, for a checkpoint: the edits, one for each time that some did, and by group how
    many units there were and are."""

    edits: list[Edit] = field(default_factory=list)
    had: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)

    def note(self, less: Narrowing) -> None:
        """That some have left."""
        self.had = self.had or less.units
        self.kept |= less.kept
        self.edits.append(less.edit)

    def rows(self) -> Details:
        """For the report."""
        rows: list[dict[str, float | int | str | None]] = [
            {"name": name, "units": units, "kept": self.kept.get(name, units)} for name, units in self.had.items()
        ]
        return {"groups": rows}


class _Search:
    """One search: what stays the same over its rounds, how far it is, and the best that was found."""

    def __init__(self, step: Compress, context: Context) -> None:
        self._step, self._context = step, context
        self._module = context.model.module
        self._judge = Judge(context, "compress")
        self._few = _for_few(step, context.model)
        asked = moved(step, context.model)
        training, self._found = settle(_pruned(step, context), asked)
        self._training: Settled = training
        self._place = _Place(step.keep, step.factor)
        self._wanted = self._judge.wanted(step.max_accuracy_drop)
        self._pruned = snapshot(self._module)  # the last that held, before its values were shared
        self._best: Snapshot | None = None
        self._units = _Units()
        self._narrows = step.narrow and rewritable(context.model)
        self._had = had(_plain(context.model)) if self._narrows else {}
        self._whole = self._weights()

    def run(self) -> Details:
        self._resume()
        while self._place.number < self._step.rounds and not self._place.done:
            self._round()
            self._save()
        restore(self._module, self._best or self._pruned, self._context.device)
        if self._context.checkpoints is not None:
            self._context.checkpoints.clear()
        return (
            {
                "wanted_validation_metric": self._judge.shown(self._wanted),
                "held": self._best is not None,
                "held_by_margin": self._place.firm,
                "kept_share": self._place.held,
                "packed_bytes": self._place.size,
                "rounds": self._place.rows,
            }
            | self._found
            | self._left()
        )

    def _left(self) -> Details:
        """What is left of a network that units have left."""
        return self._units.rows() | remaining(self._had, _plain(self._context.model)) if self._units.edits else {}

    def _round(self) -> None:
        """Prunes to the share that is next, shares values on a copy, and judges that."""
        place = self._place
        self._prune(max(1 - place.keep * (self._whole / self._weights()), LEAST))
        pruned = self._judge.module(self._module)
        attempt = self._shared(pruned)
        holds = attempt.metric >= self._wanted
        # Twice measured, as it is and before its values were shared, it is less by chance.
        firm = holds and (pruned + attempt.metric) / 2 >= self._wanted + self._step.margin * self._error()
        less = narrowing(self._context, self._step.exclude, attempt) if holds and self._narrows else None
        size = attempt.size if less is None else less.size
        place.rows.append(
            {
                "round": place.number + 1,
                "kept": place.keep,
                "criterion": self._criterion(),
                "times_as_long": self._times(),
                "validation_metric_pruned": self._judge.shown(pruned),
                "validation_metric": self._judge.shown(attempt.metric),
                "entries": attempt.entries,
                "packed_bytes": size,
                "holds": int(holds) + int(firm),
            }
        )
        place.number += 1
        better = holds and place.better(size, firm)
        if better:
            self._best, place.size, place.held, place.firm = attempt.state, size, place.keep, firm
            self._pruned = snapshot(self._module)
            self._narrow(less)
        if better or (holds and not place.fine):
            place.failures = 0
            place.keep *= place.factor
        else:
            self._fail(attempt.metric)

    def _narrow(self, less: Narrowing | None) -> None:
        """The network, and both states that the search goes back to, without the units that are dead in them."""
        if less is None or self._best is None:
            return
        take(self._context, less.module, [less.edit])
        self._module = self._context.model.module
        self._best, self._pruned = self._best.narrowed(less.entries), self._pruned.narrowed(less.entries)
        restore(self._module, self._pruned, self._context.device)
        self._units.note(less)

    def _weights(self) -> int:
        """How many weights the network has that can be pruned, zeros among them."""
        return sum(weight.value().numel() for weight in select(self._module, self._step.exclude))

    def _fail(self, metric: float) -> None:
        """On, since fewer weights may do better; but back to the last that held where it is clearly worse, or has been
        for as many rounds as patience lasts."""
        place = self._place
        place.failures += 1
        if not place.fine and place.failures < self._step.patience and metric >= self._wanted - 2 * self._error():
            place.keep *= place.factor
            return
        if place.fine and place.failures >= self._step.patience:
            place.done = True
            return
        if not place.fine:
            place.fine, place.failures = True, 0
        restore(self._module, self._pruned, self._context.device)
        place.factor **= 0.5
        place.keep = place.factor * (1.0 if place.held is None else place.held)

    def _error(self) -> float:
        """The standard error of the metric, where it is a share of samples; of others nothing is known."""
        share = abs(self._wanted)
        if self._judge.shown(1.0) < 0 or share > 1 or self._context.feed is None:
            return 0.0
        return math.sqrt(share * (1 - share) / self._context.feed.size("validation"))

    def _prune(self, sparsity: float) -> None:
        step = Prune(
            sparsity=sparsity,
            criterion=self._criterion(),
            schedule="cubic",
            exclude=self._step.exclude,
            training=self._of_round(),
        )
        PruneTechnique().apply(step, self._part(0.0, 2 / 3))
        weights = WeightSet(self._module, select(self._module, self._step.exclude))
        drop_dead(self._context, weights, DEAD_SAMPLES)

    def _shared(self, pruned: float) -> Attempt:
        """With values shared among weights. Where that is all that it fails by: more gently, and then with finer ones.
        Of few weights the positions take most of the bytes, and a bit more for a value costs little."""
        entries, context = self._step.entries, self._part(2 / 3, 1 / 3)
        attempt = self._coded(entries, CODED_RATE, context)
        again = replace(context, progress=lambda share: None)
        for finer, rate in self._further():
            if attempt.metric >= self._wanted or pruned < self._wanted:
                break
            attempt = max(attempt, self._coded(finer, rate, again), key=lambda one: one.metric)
        return attempt

    def _further(self) -> Iterator[tuple[int, float]]:
        """The entries and rates of further tries: as many as at first, then twice as many each, up to the most."""
        entries = self._step.entries
        yield entries, GENTLE_RATE
        while entries < self._step.most_entries:
            entries = min(2 * entries, self._step.most_entries)
            yield entries, CODED_RATE

    def _coded(self, entries: int, rate: float, context: Context) -> Attempt:
        """A copy whose weights share values, trained, rounded, and packed."""
        before = snapshot(self._module)
        step = Codebook(
            entries=entries,
            assignment="reestimated",
            entropy_weight=ENTROPY_WEIGHT * (self._step.entries / entries) ** 2,
            precision="float16",
            biases=True,
            exclude=self._step.exclude,
            training=_gentler(self._of_round(), rate),
        )
        QuantizeTechnique().apply(step, context)
        module = self._context.model.round_as_stored(baked(self._module).cpu())
        attempt = Attempt(
            self._judge.module(self._module),
            len(packed(stored_state(module, self._context.model))[0]),
            snapshot(self._module),
            module,
            entries,
        )
        restore(self._module, before, self._context.device)
        return attempt

    def _criterion(self) -> Criterion:
        """Where many weights stay any will do, and noise takes twice the time."""
        return self._few if self._place.keep < MANY else "magnitude"

    def _times(self) -> int:
        """On the way down it only matters that a network holds, behind it how far it can go: few weights learn
        slowly."""
        return self._step.longer if self._place.fine else 1

    def _of_round(self) -> Settled:
        return _stretched(self._training, self._times())

    def _part(self, start: float, width: float) -> Context:
        """The context of a training that is a part of a round; its checkpoints are none of the job's."""
        return replace(
            self._context,
            checkpoints=None,
            progress=functools.partial(_progress, self._context, self._place.number + start, width, self._step.rounds),
        )

    def _save(self) -> None:
        """A checkpoint after every round."""
        if self._context.checkpoints is None:
            return
        parts: Parts = {
            "module": module_state(self._module),
            "masks": mask_state(self._module),
            "random": random_state(self._context.device),
            "search": {"place": asdict(self._place), "wanted": self._wanted, "units": asdict(self._units)},
            "pruned_module": self._pruned.module,
            "pruned_masks": self._pruned.masks,
        }
        if self._best is not None:
            parts |= {"best_module": self._best.module, "best_masks": self._best.masks}
        self._context.checkpoints.remember(self._found)
        self._context.checkpoints.save({name: cloned(state) for name, state in parts.items()})

    def _resume(self) -> None:
        """Takes up what an earlier attempt left, if it did."""
        parts = None if self._context.checkpoints is None else self._context.checkpoints.waiting()
        if parts is None:
            return
        search = parts["search"]
        self._units = _Units(**search.get("units", {}))
        retake(self._context, self._units.edits)
        self._module = self._context.model.module
        load_state(self._module, parts, self._context.device)
        self._place, self._wanted = _Place(**search["place"]), search["wanted"]
        self._pruned = Snapshot(parts["pruned_module"], parts["pruned_masks"])
        if "best_module" in parts:
            self._best = Snapshot(parts["best_module"], parts["best_masks"])


def _plain(model: Model) -> Model:
    """Without constraints, of which codebooks have parameters of their own."""
    return replace(model, module=baked(model.module))


def _pruned(step: Compress, context: Context) -> Context:
    """With a copy of the network that has something to recover from: on a trained one the lowest rate is the best."""
    model = replace(context.model, module=copy.deepcopy(context.model.module))
    apart = replace(context, model=model)
    PruneTechnique().apply(Prune(sparsity=1 - PROBED, exclude=step.exclude), apart)
    return apart


def _for_few(step: Compress, model: Model) -> Criterion:
    """What chooses where few weights stay. One that is not for all layers would leave the others as they are."""
    chosen = select(model.module, step.exclude)
    fits = step.training.optimizer in NORMALIZING and noisy(model, chosen) == chosen
    return "variational" if fits else "magnitude"


def moved(step: Compress, model: Model) -> Training:
    """The step's training, which moves pictures where it says nothing else."""
    fits = movable(model.facts) and all((side or 0) > step.shift for side in model.facts.inputs[0].shape[1:])
    if not step.shift or not fits or step.training.augmentation is not None:
        return step.training
    return step.training.model_copy(update={"augmentation": Augmentation(crop=Crop(padding=step.shift))})


def _stretched(training: Settled, times: float) -> Settled:
    """As many times as long; once at least."""
    if training.steps is not None:
        return training.model_copy(update={"steps": max(1, int(times * training.steps))})
    return training.model_copy(update={"epochs": max(1, int(times * (training.epochs or 1)))})


def _gentler(training: Settled, rate: float) -> Settled:
    """Half as long, at a share of the rate."""
    return _stretched(training.model_copy(update={"lr": rate * training.lr}), 0.5)


def _progress(context: Context, number: float, width: float, rounds: int, share: float) -> None:
    context.progress(min(1.0, (number + width * share) / rounds))
