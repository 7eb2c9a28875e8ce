"""What an inspection tells beyond what a loader knows."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from app.contract.facts import Applicability, ModelFacts
from tests.worker.helpers import mlp, tiny_model
from tests.worker.loading.files import bert, folder_files, linear_file, linear_spec, zipped
from tests.worker.nets import Recurrent, lenet, text_model
from worker.inspect import examine, inspect_upload
from worker.loading.describe import layer_facts
from worker.model import Model


def told(model: Model) -> dict[tuple[str, str | None], Applicability]:
    facts = model.facts.model_copy(update={"layers": layer_facts(model.module)})
    found = examine(Model(model.module, facts, model.encode, model.save, model.task)).techniques
    return {(entry.technique, entry.method): entry for entry in found}


def test_a_convolutional_net_and_what_can_be_done_with_it() -> None:
    found = told(tiny_model(lenet().eval(), shape=(1, 28, 28)))
    assert {key: entry.applies for key, entry in found.items()} == {
        ("prune", None): True,
        ("prune", "structured"): True,
        ("finetune", None): True,
        ("distill", None): True,
        ("quantize", "static"): True,
        ("quantize", "dynamic"): True,
        ("quantize", "codebook"): True,
        ("quantize", "weight_only"): True,
        ("quantize", "qat"): True,
        ("quantize", "mixed"): True,
        ("quantize", "auto"): True,
        ("quantize", "cast"): True,
        ("compress", None): True,
        ("factorize", "auto"): True,
        ("resize", "drop_layers"): False,  # of no blocks
        ("resize", "width"): True,
        ("fuse", None): True,
        ("resize", "connections"): False,  # in a row of layers
    }


def test_what_does_not_apply_says_why() -> None:
    found = told(tiny_model(nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()).eval(), shape=(1, 8, 8)))
    dynamic = found["quantize", "dynamic"]
    assert not dynamic.applies
    assert dynamic.reason is not None
    assert "convolutions" in dynamic.reason
    assert told(tiny_model(nn.BatchNorm1d(10).eval(), shape=(10,)))["prune", None].reason is not None


@pytest.mark.parametrize("kind", ["mlp", "recurrent"])
def test_outputs_have_the_batch_left_out(kind: str) -> None:
    model = tiny_model(mlp().eval()) if kind == "mlp" else text_model(Recurrent(nn.GRU).eval(), classes=4)
    (output,) = examine(model).outputs
    assert (output.name, output.shape, output.dtype) == ("logits", (10,) if kind == "mlp" else (4,), "float32")


def test_a_dimension_that_grows_with_the_input_is_open() -> None:
    module = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 3)).eval()
    model = text_model(module, classes=3)
    tagged = Model(
        module, model.facts.model_copy(update={"task": "token-classification"}), model.encode, model.save, model.task
    )
    assert examine(tagged).outputs[0].shape == (None, 3)


def test_an_upload_is_inspected_from_its_bytes(tmp_path: Path) -> None:
    facts = inspect_upload("model", linear_file(tmp_path / "w"), "w.safetensors", linear_spec(), tmp_path)
    assert isinstance(facts, ModelFacts)
    assert facts.cost is not None
    assert (facts.cost.macs, facts.layers[0].macs, facts.native_file) == (8, 8, "model.safetensors")
    folder = tmp_path / "bert"
    bert(folder)
    (tmp_path / "upload").write_bytes(zipped(folder_files(folder)))
    facts = inspect_upload("model", tmp_path / "upload", "bert.zip", {}, tmp_path)
    assert isinstance(facts, ModelFacts)
    assert facts.cost is not None
    assert (facts.cost.length, facts.outputs[0].shape, facts.native_file) == (32, (3,), "model.zip")
