"""The ways back: checkpoints along a training, going on from that of an earlier attempt, and back from a divergence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from app.contract.errors import TrainingDiverged
from app.contract.training import Training
from worker.checkpoints.points import Checkpoints, Parts, load_state
from worker.context import Context
from worker.ranks.ranks import Ranks
from worker.ranks.sharded import gathered, local
from worker.training.divergence import Diverged, Guard
from worker.training.place import Place
from worker.training.randomness import random_state
from worker.training.states import State, Unusable, mask_state, module_state


@runtime_checkable
class HasState(Protocol):
    """A part of a training that knows where it stands."""

    def state(self) -> State: ...

    def load(self, state: State) -> None: ...


class Recovery:
    """Of one training: of the module, the generator `noise`, the `guard`, the place, and its other parts by name."""

    def __init__(
        self,
        context: Context,
        training: Training,
        guard: Guard,
        place: Place,
        noise: torch.Generator,
        parts: Mapping[str, HasState | None],
    ) -> None:
        self._module, self._device = context.model.module, context.device
        self._training, self._guard, self._at, self._noise = training, guard, place, noise
        self._with_state: dict[str, HasState] = {"guard": guard, "place": place}
        self._with_state |= {name: part for name, part in parts.items() if part is not None}
        self._points, self._ranks = context.checkpoints, context.ranks
        if self._points is None and training.divergence_retries:
            self._points = Checkpoints(context.scratch, writes=context.ranks.leads)
        self._marked: int | None = None
        self.resumed_at: int | None = None

    def resume(self) -> None:
        """Takes up what an earlier attempt left of this training, if it did. Raises Unusable."""
        waiting = None if self._points is None else self._points.waiting()
        if self._points is not None and waiting is not None:
            self._load(waiting)
            self._points.save(waiting)
            self._marked = self.resumed_at = self._at.step

    def mark(self) -> None:
        """Called before every step: a checkpoint, where one is due and the training is sound.

        Which steps have one depends on nothing but the training, so that a resumed one goes back to the same.
        Raises Diverged.
        """
        step = self._at.step
        if self._points is None or step % self._training.checkpoint_steps or step == self._marked:
            return
        check_weights(self._module, self._ranks)
        if self._guard.sound:
            self._points.save(self._parts())
            self._marked = step

    def go_back(self, trouble: Diverged, rate: float, total: int) -> None:
        """To the last checkpoint, with a lower rate from now on.

        Raises TrainingDiverged where it was tried as often as it may be.
        """
        incident = {"step": self._at.step, "learning_rate": rate, "what": str(trouble)}
        incidents = [*self._guard.incidents, incident]
        if self._guard.exhausted or self._points is None:
            tries = len(incidents) - 1
            after = f", and {tries} lower rates had not helped" if tries else ""
            raise TrainingDiverged(
                f"{trouble} at step {self._at.step} of {total}, at a learning rate of {rate:g} "
                f"({self._training.optimizer}){after}. Use a lower learning rate."
            )
        self._load(self._points.load())
        self._guard.incidents = incidents

    def close(self) -> None:
        """Nothing comes back to this training any more."""
        if self._points is not None:
            self._points.clear()

    def _parts(self) -> Parts:
        parts: Parts = {
            "module": module_state(self._module),
            "masks": mask_state(self._module),
            "noise": {"noise": self._noise.get_state()},
            "training": self._training.model_dump(mode="json"),
        }
        parts |= {_random(rank): state for rank, state in enumerate(self._ranks.listed(random_state(self._device)))}
        parts |= {name: part.state() for name, part in self._with_state.items()}
        return {name: gathered(part, self._ranks.leads) for name, part in parts.items()}

    def _load(self, parts: Parts) -> None:
        if parts.get("training") != self._training.model_dump(mode="json"):
            raise Unusable("it is of a training with other options")
        try:
            load_state(self._module, parts, self._device, _random(self._ranks.rank))
            self._noise.set_state(parts["noise"]["noise"])
            for name, part in self._with_state.items():
                part.load(parts[name])
        except (KeyError, TypeError, RuntimeError) as error:
            raise Unusable(f"it is of another training ({type(error).__name__}: {error})") from error


def _random(rank: int) -> str:
    """The name of the part with the random numbers of a process."""
    return f"random-{rank}" if rank else "random"


def check_weights(module: nn.Module, ranks: Ranks) -> None:
    """Raises Diverged where one is not finite, in all processes."""
    sound = all(bool(local(parameter).isfinite().all()) for parameter in module.parameters())
    if ranks.total(torch.tensor(float(not sound))):
        raise Diverged("A weight became infinite or not a number")
