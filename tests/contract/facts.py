"""Facts of small models and datasets, for tests of the contract."""

from __future__ import annotations

from typing import Any

from app.contract.facts import Cost, DatasetFacts, LayerFacts, ModelFacts, SplitFacts, TensorFacts

COST = Cost(
    length=None,
    macs=7840,
    seconds=1e-5,
    weight_bytes=31_400,
    activation_bytes=3_136,
    inference_bytes=34_536,
    training_bytes=157_000,
)
PIXELS = TensorFacts(name="input", shape=(1, 28, 28), dtype="float32")


def model_facts(**changes: Any) -> ModelFacts:
    """A classifier of 1x28x28 arrays or images into ten classes."""
    facts = ModelFacts(
        format="architecture",
        task="image-classification",
        accepts=("arrays", "images"),
        inputs=(PIXELS,),
        classes=10,
        labels=tuple("0123456789"),
        parameters=7850,
        layers=(LayerFacts(name="1", type="Linear", shape=(10, 784), parameters=7850),),
    )
    return facts.model_copy(update=changes)


def split_facts(**changes: Any) -> SplitFacts:
    """A hundred labelled samples that fit `model_facts()`."""
    facts = SplitFacts(samples=100, inputs=(PIXELS,), targets="classes", target_min=0, target_max=9)
    return facts.model_copy(update=changes)


def dataset_facts(*names: str, **changes: Any) -> DatasetFacts:
    """Arrays with the named splits, all alike."""
    facts = DatasetFacts(kind="arrays", splits={name: split_facts() for name in names or ("train", "test")})
    return facts.model_copy(update=changes)
