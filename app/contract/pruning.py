"""The prune step: which weights go, by what, in what pattern, and when."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from app.contract.strict import Strict
from app.contract.training import Training

Pattern = Annotated[
    str, Field(min_length=1, max_length=256, description="A layer's name; * and ? match as in a shell.")
]
Sparsity = Annotated[float, Field(gt=0, lt=1)]
Criterion = Literal[
    "magnitude", "random", "gradient", "taylor", "fisher", "movement", "variational", "wanda", "sparsegpt"
]
Scope = Literal["global", "layer", "erk", "auto"]

_N_OF_M = re.compile(r"([1-9][0-9]?):([1-9][0-9]?)")
MOST_OF_A_GROUP = 64
# What these look at besides the weights.
OF_GRADIENTS = ("gradient", "taylor", "fisher")
OF_INPUTS = ("wanda", "sparsegpt")
OF_TRAINING = ("movement", "variational")
# Optimizers that move any number by about the rate, as logarithms of variances have to be moved.
NORMALIZING = ("adam", "adamw", "nadam", "radam")


class Regrowth(Strict):
    """Weights come back where the gradient asks for them, as many as go (RigL: Evci et al. 2020)."""

    share: Annotated[
        float, Field(gt=0, le=0.9, description="Of the weights that are kept, replaced at first; falls as a cosine.")
    ] = 0.3
    every: Annotated[int, Field(ge=1, le=100_000, description="Steps between two exchanges.")] = 100
    until: Annotated[float, Field(gt=0, le=1, description="The share of the training after which none comes.")] = 0.75


class Prune(Strict):
    """Removes weights: the least important become zero and stay zero through every later step."""

    technique: Literal["prune"] = "prune"
    granularity: Annotated[
        str,
        Field(
            pattern=r"^(unstructured|block|[1-9][0-9]?:[1-9][0-9]?)$",
            description="unstructured: single weights. N:M, such as 2:4: N of every M neighbours along the input "
            "dimension stay. block: blocks of `block` go or stay as one. structured is a step with fields of its "
            "own: whole units leave the network.",
        ),
    ] = "unstructured"
    block: Annotated[
        tuple[Annotated[int, Field(ge=1, le=64)], Annotated[int, Field(ge=1, le=64)]] | None,
        Field(description="Outputs x inputs of a block, such as [1, 4]."),
    ] = None
    criterion: Criterion = Field(
        "magnitude",
        description="What a weight w with gradient g and input x is worth. magnitude: |w|; gradient: |g|; taylor: "
        "|w g|; fisher: w^2 E[g^2]; movement: what training moves away from zero; variational: w^2 over the variance "
        "of the noise that the weight has learned to bear in training; wanda: |w| ||x||; sparsegpt: what the layer's "
        "outputs lose, the weights that stay being adjusted.",
    )
    norm: Literal["l1", "l2"] = Field("l1", description="How weights of one block add up.")
    sparsity: Annotated[
        float | None, Field(gt=0, lt=1, description="Share of the prunable weights to remove. N:M states its own.")
    ] = None
    threshold: Annotated[float | None, Field(gt=0, description="Remove every weight with |w| below this.")] = None
    scope: Scope | None = Field(
        None,
        description="Where `sparsity` is met. global: over all prunable weights together. layer: in every layer. erk: "
        "in all together, small layers less (Erdos-Renyi-Kernel). auto: in all together, by how much each layer's loss "
        "was measured to hurt. Default: global; layer for wanda, sparsegpt and N:M.",
    )
    layers: Annotated[dict[Pattern, Sparsity], Field(max_length=256)] = Field(
        default_factory=dict, description="A sparsity of their own for layers by name; the first that matches counts."
    )
    schedule: Literal["one_shot", "iterative", "cubic"] = Field(
        "one_shot",
        description="All at once; in `rounds` that each remove as large a share of what is left; or growing along a "
        "cubic during training (Zhu & Gupta 2017).",
    )
    rounds: Annotated[int, Field(ge=2, le=100, description="Of schedule iterative.")] = 5
    rewind: Literal["weights", "learning_rate"] | None = Field(
        None,
        description="Of schedule iterative: train anew after every round, from the learning rate's schedule on "
        "(learning_rate), and from the weights as they were before the step too (weights; Renda et al. 2020). "
        "null: one training over all rounds.",
    )
    regrow: Regrowth | None = None
    samples: Annotated[
        int, Field(ge=1, le=65_536, description="Samples that gradients, inputs or losses are looked at with.")
    ] = 256
    exclude: Annotated[tuple[Pattern, ...], Field(max_length=256)] = ()
    training: Training | None = Field(None, description="Training that follows (one_shot) or accompanies (others).")

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """N and M, where that is the granularity."""
        match = _N_OF_M.fullmatch(self.granularity)
        return (int(match[1]), int(match[2])) if match else None

    @property
    def within(self) -> Scope:
        """The scope, which validation has filled in."""
        assert self.scope is not None
        return self.scope

    @model_validator(mode="after")
    def _filled_in(self) -> Prune:
        if self.scope is None:
            usual = "layer" if self.criterion in OF_INPUTS or self.n_of_m else "global"
            object.__setattr__(self, "scope", usual)
        return self

    @model_validator(mode="after")
    def _amount(self) -> Prune:
        if self.n_of_m is not None:
            n, m = self.n_of_m
            if not n < m <= MOST_OF_A_GROUP:
                raise ValueError(
                    f"{n}:{m} keeps N of every M weights: N is less than M, and M {MOST_OF_A_GROUP} at most"
                )
            if self.sparsity is not None or self.threshold is not None or self.layers:
                raise ValueError(f"granularity {n}:{m} states the sparsity: leave sparsity, threshold and layers out")
            if self.schedule != "one_shot" or self.regrow is not None or self.within != "layer":
                raise ValueError("N:M is pruned at once, in every layer alike: leave schedule, scope and regrow out")
        elif (self.sparsity is None) == (self.threshold is None):
            raise ValueError("give exactly one of sparsity and threshold")
        if (self.block is None) == (self.granularity == "block"):
            raise ValueError("granularity block and block belong together: give both")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Prune:
        if self.threshold is not None:
            if self.criterion != "magnitude" or self.granularity != "unstructured" or self.layers:
                raise ValueError("threshold is for criterion magnitude and granularity unstructured, without layers")
            if self.schedule != "one_shot":
                raise ValueError(
                    f"schedule {self.schedule} grows towards a sparsity: give sparsity instead of threshold"
                )
        if self.schedule == "cubic" and self.training is None:
            raise ValueError("schedule cubic grows the sparsity during training: give training")
        if self.rewind is not None and (self.schedule != "iterative" or self.training is None):
            raise ValueError("rewind is for schedule iterative with training")
        if self.criterion in OF_TRAINING and (self.training is None or self.schedule == "one_shot" or self.rewind):
            raise ValueError(
                f"{self.criterion} is what one training finds: give training, schedule cubic or iterative, no rewind"
            )
        if self.criterion == "variational" and self.training and self.training.optimizer not in NORMALIZING:
            raise ValueError(f"variational learns variances: give training one of {', '.join(NORMALIZING)}")
        if self.criterion in OF_INPUTS and self.block is not None:
            raise ValueError(f"{self.criterion} prunes single weights or N:M: give another criterion, or no block")
        if self.criterion in OF_INPUTS and (self.schedule != "one_shot" or self.within != "layer"):
            raise ValueError(f"{self.criterion} prunes at once, in every layer alike: leave schedule and scope out")
        return self

    @model_validator(mode="after")
    def _regrows(self) -> Prune:
        if self.regrow is None:
            return self
        if self.training is None or self.rewind is not None:
            raise ValueError("regrow exchanges weights during one training: give training, and no rewind")
        if self.threshold is not None or self.criterion in (*OF_TRAINING, *OF_INPUTS):
            raise ValueError(f"regrow keeps a sparsity, and {self.criterion} or a threshold decides for good: give one")
        return self
