"""The prune step with granularity structured: channels, neurons, heads and hidden features leave the network."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from app.contract.budgets import TimedBudget
from app.contract.pruning import Pattern
from app.contract.strict import Strict
from app.contract.training import Training

Importance = Literal["l1", "l2", "taylor", "fisher", "bn_scale", "fpgm", "activations", "random"]
BY_GRADIENTS = ("taylor", "fisher")
BY_INPUTS = ("activations",)

# Fields of steps that take units out.
Worth = Annotated[
    Importance,
    Field(
        description="What a unit is worth. l1, l2: the norm of all weights that hang on it. taylor: by how much the "
        "loss would change to first order (Molchanov et al. 2019); fisher: the mean over samples of that squared (Liu "
        "et al. 2021). bn_scale: the factor that a batch norm gives it (Liu et al. 2017). fpgm: how far its weights "
        "are from those of the others (He et al. 2019). activations: what it gives on samples, times the norm of the "
        "weights that read it (after Wanda, Sun et al. 2023).",
    ),
]
RoundTo = Annotated[
    int, Field(ge=1, le=256, description="Groups keep a multiple of it, heads apart: what vector units like.")
]
KeepAtLeast = Annotated[float, Field(ge=0, lt=1, description="Share of its units that every group keeps.")]
LookedAt = Annotated[
    int, Field(ge=1, le=65_536, description="Samples that gradients, inputs or outputs are looked at with.")
]


class GroupLasso(Strict):
    """A training in front, whose loss is larger by `strength` times the sum of the norms of what hangs on each unit:
    those that matter little become small (group lasso, Yuan & Lin 2006; Wen et al. 2016)."""

    strength: Annotated[float, Field(gt=0, le=10)] = 1e-4
    training: Training = Field(default_factory=Training)

    @model_validator(mode="after")
    def _settled(self) -> GroupLasso:
        if self.training.automatic:
            raise ValueError(f"lasso trains as it is told: give {', '.join(self.training.automatic)} instead of auto")
        return self


class Recovers(Strict):
    """How a step that takes units out brings the network back to what it could."""

    reconstruct: bool | Literal["auto"] = Field(
        "auto",
        description="Where the dataset has samples, layers that read units which are gone are fitted by least squares "
        "to what they gave with them (He, Zhang & Sun 2017). auto: where no training follows, here or in a later step, "
        "by which a network may come out behind one that begins with the weights that it had.",
    )
    training: Training | None = Field(None, description="Training that follows, behind every round, to recover.")

    @property
    def reconstructs(self) -> bool:
        """Whether layers are fitted again, where there are samples; later steps are looked at when a spec is
        resolved."""
        return self.training is None if self.reconstruct == "auto" else self.reconstruct


class StructuredPrune(Recovers):
    """Takes the least important units out of the network, with all that hangs on them: a smaller dense network."""

    technique: Literal["prune"] = "prune"
    granularity: Literal["structured"] = "structured"
    criterion: Worth = "l2"
    scope: Literal["global", "local", "isomorphic", "auto"] = Field(
        "global",
        description="With which others a unit is compared. global: all, each relative to the mean of its group; local: "
        "those of its group, so that each loses the same share; isomorphic: those of groups of one shape at the same "
        "place of equal blocks (Fang et al. 2024). auto: groups lose units where the outputs move least for what is "
        "saved, as measured on samples.",
    )
    budget: TimedBudget | None = Field(None, description="How much of the model may be left.")
    sparsity: Annotated[float | None, Field(gt=0, lt=1, description="Instead: the share of all units that go.")] = None
    round_to: RoundTo | Literal["auto"] = Field(
        "auto",
        description="Groups keep a multiple of it, heads apart: what vector units like. auto: for convolutions what "
        "ONNX Runtime gains from on the worker, 16 where its processor has AVX-512 and 8 elsewhere; for other layers "
        "8; and finer ones where the budget is not met so.",
    )
    keep_at_least: KeepAtLeast = 0.1
    samples: LookedAt = 256
    lasso: GroupLasso | None = None
    rounds: Annotated[
        int, Field(ge=1, le=100, description="In so many rounds, each with an equal share and the training behind it.")
    ] = 1
    exclude: Annotated[tuple[Pattern, ...], Field(max_length=256)] = ()

    @model_validator(mode="after")
    def _consistent(self) -> StructuredPrune:
        if (self.budget is None) == (self.sparsity is None):
            raise ValueError("give exactly one of budget and sparsity")
        if self.rounds > 1 and self.training is None:
            raise ValueError("rounds are for a training behind each: give training, or leave rounds out")
        if (
            self.lasso is not None
            and self.training is not None
            and self._crew(self.lasso.training) != self._crew(self.training)
        ):
            raise ValueError("both trainings take the same hosts and processes: those of lasso differ")
        return self

    @staticmethod
    def _crew(training: Training) -> tuple[int, int]:
        return training.hosts, training.processes

    @property
    def looks_at_samples(self) -> bool:
        """Whether it needs samples, labelled or not."""
        return self.criterion in BY_INPUTS or self.scope == "auto"
