"""Jobs that make networks narrower, on models of every kind: what is delivered loads as what was uploaded did."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from app.contract.budgets import TimedBudget
from app.contract.structured import StructuredPrune
from app.contract.training import Training
from app.contract.widths import ResizeWidth
from tests.worker.helpers import context_for, digits_data, part_of
from tests.worker.jobs import Recorder, job
from tests.worker.loading.files import zipped
from tests.worker.test_run_compressed_tensors import bert
from tests.worker.test_run_resize import LAYERS, PICTURE, details, folder_request, resnet
from worker.loading import load_model
from worker.model import Model
from worker.run import run_job
from worker.structure.blocks import passed, same, varied
from worker.structure.sound import without
from worker.techniques.pruning.prune import PruneTechnique
from worker.techniques.structure.resize import ResizeTechnique
from worker.techniques.structure.structured import structure_in

pytestmark = pytest.mark.usefixtures("known_memory")


def test_an_architecture_comes_back_in_its_own_words(tmp_path: Path) -> None:
    step = ResizeWidth(
        budget=TimedBudget(macs=0.6), search="evolutionary", candidates=8, samples=64, round_to=2,
        training=Training(epochs=1, lr=3e-3),
    )  # fmt: skip
    data = part_of(digits_data(PICTURE), {"train": 600, "test": 100})
    formats = {"export": ("native", "onnx")}
    request = job(tmp_path / "job", resnet(), LAYERS, PICTURE, data, (step,), **formats)
    report = run_job(request, Recorder()).report
    told = details(report)
    assert told["macs_share"] <= 0.6
    assert told["divergence"] <= told["uniform_divergence"]
    own = {one.format: one for one in report.artifacts}
    assert list(own) == ["native", "onnx"]
    measured = own["native"].measurement
    assert (measured.parameters, measured.macs) == (told["parameters"], told["macs"])
    assert told["parameters"] < told["parameters_before"]
    assert own["onnx"].measurement.metric == measured.metric is not None
    native = request.output / own["native"].name
    again = load_model(native, native.name, json.loads(told["spec"]), tmp_path)
    x = torch.randn(3, *PICTURE)
    session = onnxruntime.InferenceSession(str(request.output / "model.onnx"))
    given = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        assert torch.allclose(again.module.eval()(x), torch.from_numpy(given), atol=1e-4)


def test_a_folder_stays_a_folder_with_fewer_heads_and_features(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    bert(tmp_path / "model")
    request = folder_request(tmp_path, (ResizeWidth(multiplier=0.5),), ("native",))
    report = run_job(request, Recorder()).report
    (artifact,) = report.artifacts
    assert (artifact.format, artifact.measurement.parameters) == ("native", details(report)["parameters"])
    with zipfile.ZipFile(request.output / "model.zip") as archive:
        archive.extractall(tmp_path / "again")  # our own file
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again").eval()
    config = again.config
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (32, 1, 64)
    assert sum(own.numel() for own in again.parameters()) == details(report)["parameters"]


def uploaded(kind: str, folder: Path) -> Model:
    """A folder of transformers with four heads."""
    import transformers as T  # noqa: N812

    torch.manual_seed(0)
    shared: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    networks: dict[str, Any] = {
        "bert": lambda: T.BertForSequenceClassification(
            T.BertConfig(vocab_size=100, intermediate_size=96, num_labels=3, **shared)
        ),
        "gpt2": lambda: T.GPT2LMHeadModel(
            T.GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
        ),
        "llama": lambda: T.LlamaForCausalLM(
            T.LlamaConfig(vocab_size=100, intermediate_size=96, num_key_value_heads=2, **shared)
        ),
    }
    networks[kind]().save_pretrained(folder / "model")
    content = zipped({path.name: path.read_bytes() for path in (folder / "model").iterdir()})
    (folder / "model.zip").write_bytes(content)
    return load_model(folder / "model.zip", "model.zip", {}, folder)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        # 0.6 of four heads are two, and with them half of the features.
        ("bert", {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 56}),
        ("gpt2", {"n_embd": 32, "n_head": 2, "n_inner": 152}),
        ("llama", {"hidden_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}),
    ],
)
def test_a_config_says_what_it_has_words_for(kind: str, said: dict[str, int], tmp_path: Path) -> None:
    context = context_for(uploaded(kind, tmp_path), None, tmp_path)
    ResizeTechnique().apply(ResizeWidth(multiplier=0.6), context)
    plan: Any = context.model.plan
    assert context.model.native_as is None
    assert {name: plan.folder.config[name] for name in said} == said


def test_layers_that_lose_the_same_share_of_heads_are_not_more_and_smaller_ones(tmp_path: Path) -> None:
    context = context_for(uploaded("bert", tmp_path), None, tmp_path)
    structure, module, inputs = structure_in(context.model), context.model.module, varied(context.model)
    PruneTechnique().apply(StructuredPrune(sparsity=0.5, scope="local"), context)
    plan: Any = context.model.plan
    assert plan.folder.config["num_attention_heads"] == 2
    worth = {
        group.name: sum(
            module.get_parameter(cut.parameter).detach().index_select(cut.dim, cut.places.reshape(-1))
            .movedim(cut.dim, 0).reshape(group.units, -1).square().sum(1)
            for cut in group.cuts if len(cut.shape) > 1
        )
        for group in structure.groups
    }  # fmt: skip
    kept = {name: own.topk(len(own) // 2).indices.sort().values for name, own in worth.items()}  # type: ignore[union-attr, arg-type]
    expected, _ = without(module, structure, structure.groups, kept)
    assert same(passed(context.model.module, inputs), passed(expected, inputs))
