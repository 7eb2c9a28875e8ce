"""Hugging Face folders: equal logits after load and after save; nothing of the folder runs."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file, save, save_file

from app.contract.errors import DatasetMismatch, ModelRejected
from tests.worker.loading.files import TEXTS, bert, folder_files, tarred, tokenizer_config, tokenizer_json, zipped
from worker.data.base import RawBatch
from worker.loading import load_model
from worker.model import Model

Files = dict[str, bytes]
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 16, "width": 16},
    "image_mean": [0.5, 0.25, 0.0],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
}


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Files, Any]:
    folder = tmp_path_factory.mktemp("bert")
    module = bert(folder)
    return folder_files(folder), module


def vit(folder: Path) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        id2label={0: "cat", 1: "dog", 2: "emu"},
        label2id={"cat": 0, "dog": 1, "emu": 2},
    )
    module = ViTForImageClassification(config).eval()
    module.save_pretrained(folder)
    return module


def resnet(folder: Path) -> Any:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4)
    module = ResNetForImageClassification(config).eval()
    module.save_pretrained(folder)
    return module


def opened(content: bytes, scratch: Path, spec: dict[str, Any] | None = None) -> Model:
    path = scratch / "upload"
    path.write_bytes(content)
    return load_model(path, "upload.zip", spec or {}, scratch)


def saved(model: Model, scratch: Path) -> Path:
    output = scratch / "output"
    output.mkdir()
    return model.save(model.module, output)


@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize("top", ["", "bert-tiny/"])
def test_text_classifier_gives_equal_logits(
    tmp_path: Path, bert_folder: tuple[Files, Any], pack: Callable[[Files], bytes], top: str
) -> None:
    files, module = bert_folder
    model = opened(pack({top + name: content for name, content in files.items()}), tmp_path)
    assert model.facts.task == "text-classification"
    assert model.facts.accepts == ("arrays", "text")
    assert [tensor.name for tensor in model.facts.inputs][:2] == ["input_ids", "attention_mask"]
    assert model.facts.inputs[0].shape == (None,)
    inputs = model.encode(RawBatch(TEXTS, None))
    assert inputs[0].tolist() == [[2, 4, 6, 3, 0, 0, 0], [2, 7, 5, 8, 6, 9, 3]]
    assert inputs[1].tolist() == [[1, 1, 1, 1, 0, 0, 0], [1] * 7]
    with torch.no_grad():
        expected = module(input_ids=inputs[0], attention_mask=inputs[1]).logits
        assert torch.equal(model.module(*inputs), expected)
        again = load_model(saved(model, tmp_path), "again.zip", {}, tmp_path)
        assert torch.equal(again.module(*inputs), expected)
    assert model.facts.parameters == module.num_parameters()
    assert "bert.encoder.layer.0.attention.self.query" in [layer.name for layer in model.facts.layers]


@pytest.mark.parametrize("make", [vit, resnet])
@pytest.mark.parametrize("processor", [None, PROCESSOR])
def test_image_classifier_gives_equal_logits(
    tmp_path: Path, make: Callable[[Path], Any], processor: dict[str, Any] | None
) -> None:
    folder = tmp_path / "folder"
    module = make(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    model = opened(zipped(folder_files(folder)), tmp_path)
    assert model.facts.accepts == ("arrays", "images")
    inputs = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = module(inputs).logits
        assert torch.equal(model.module(*model.encode(RawBatch({"input": inputs}, None))), expected)
        again = load_model(saved(model, tmp_path), "again.zip", {}, tmp_path)
        assert torch.equal(again.module(inputs), expected)
    assert again.facts == model.facts


def test_pictures_go_through_the_folders_processor(tmp_path: Path) -> None:
    vit(tmp_path / "folder")
    (tmp_path / "folder" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    model = opened(zipped(folder_files(tmp_path / "folder")), tmp_path)
    (pixels,) = model.encode(RawBatch([Image.new("RGB", (40, 30), (255, 0, 51)), Image.new("L", (9, 9), 255)], None))
    assert pixels.shape == (2, 3, 16, 16)
    # (value / 255 - mean) / std
    assert pixels[0, :, 3, 3].tolist() == pytest.approx([1.0, -0.5, 0.4], abs=1e-6)
    assert pixels[1, :, 3, 3].tolist() == pytest.approx([1.0, 1.5, 2.0], abs=1e-6)


def test_without_a_processor_pictures_are_resized_and_divided_by_255(tmp_path: Path) -> None:
    vit(tmp_path / "folder")
    model = opened(zipped(folder_files(tmp_path / "folder")), tmp_path)
    (pixels,) = model.encode(RawBatch([Image.new("RGB", (40, 30), (255, 0, 51))], None))
    assert pixels.shape == (1, 3, 16, 16)
    assert pixels[0, :, 3, 3].tolist() == pytest.approx([1.0, 0.0, 0.2])
    assert model.facts.labels == ("cat", "dog", "emu")


def test_pictures_of_different_sizes_need_a_size(tmp_path: Path) -> None:
    resnet(tmp_path / "folder")
    model = opened(zipped(folder_files(tmp_path / "folder")), tmp_path)
    assert model.facts.inputs[0].shape == (3, None, None)
    with pytest.raises(DatasetMismatch, match="different sizes"):
        model.encode(RawBatch([Image.new("RGB", (16, 16)), Image.new("RGB", (17, 16))], None))


def test_long_texts_are_cut_at_the_models_maximum(tmp_path: Path, bert_folder: tuple[Files, Any]) -> None:
    model = opened(zipped(bert_folder[0] | {"tokenizer_config.json": tokenizer_config(model_max_length=512)}), tmp_path)
    inputs = model.encode(RawBatch(["good " * 500], None))
    assert inputs[0].shape == (1, 64)
    assert model.module(*inputs).shape == (1, 3)


def test_arrays_out_of_range_are_refused(tmp_path: Path, bert_folder: tuple[Files, Any]) -> None:
    model = opened(zipped(bert_folder[0]), tmp_path)
    names = [tensor.name for tensor in model.facts.inputs]
    with pytest.raises(DatasetMismatch, match="knows 0 to 9"):
        model.encode(RawBatch({name: torch.full((1, 5), 10) for name in names}, None))
    with pytest.raises(DatasetMismatch, match="65 tokens; the model takes at most 64"):
        model.encode(RawBatch({name: torch.ones(1, 65, dtype=torch.int64) for name in names}, None))


def test_without_a_tokenizer_arrays_alone_are_taken(tmp_path: Path, bert_folder: tuple[Files, Any]) -> None:
    files = {name: content for name, content in bert_folder[0].items() if not name.startswith("tokenizer")}
    model = opened(zipped(files), tmp_path)
    assert model.facts.accepts == ("arrays",)
    with pytest.raises(DatasetMismatch, match=r"tokenizer\.json"):
        model.encode(RawBatch(TEXTS, None))


def test_sharded_weights_come_together(tmp_path: Path, bert_folder: tuple[Files, Any]) -> None:
    files, module = bert_folder
    state = load(files["model.safetensors"])
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    index = {"metadata": {}, "weight_map": {name: shard for shard, group in shards.items() for name in group}}
    rest = {name: content for name, content in files.items() if name != "model.safetensors"}
    rest |= {shard: save({name: state[name] for name in group}, {"format": "pt"}) for shard, group in shards.items()}
    model = opened(zipped(rest | {"model.safetensors.index.json": json.dumps(index).encode()}), tmp_path)
    inputs = model.encode(RawBatch(TEXTS, None))
    with torch.no_grad():
        expected = module(input_ids=inputs[0], attention_mask=inputs[1]).logits
        assert torch.equal(model.module(*inputs), expected)
        again = load_model(saved(model, tmp_path), "again.zip", {}, tmp_path)
        assert torch.equal(again.module(*inputs), expected)


def test_saving_keeps_every_other_file_and_the_dtype(tmp_path: Path, bert_folder: tuple[Files, Any]) -> None:
    files = dict(bert_folder[0])
    half = {name: tensor.half() for name, tensor in load(files["model.safetensors"]).items()}
    files |= {"model.safetensors": save(half, {"format": "pt"}), "README.md": b"# a card", "more.json": b"{}"}
    model = opened(zipped({f"top/{name}": content for name, content in files.items()}), tmp_path)
    path = saved(model, tmp_path)
    with zipfile.ZipFile(path) as archive:
        written = {name: archive.read(name) for name in archive.namelist()}
    assert {n: c for n, c in written.items() if n != "model.safetensors"} == {
        n: c for n, c in files.items() if n != "model.safetensors"
    }
    state = load(written["model.safetensors"])
    assert all(torch.equal(state[name], tensor) for name, tensor in half.items())


def test_saving_twice_gives_the_same_bytes(tmp_path: Path, bert_folder: tuple[Files, Any]) -> None:
    model = opened(zipped(bert_folder[0]), tmp_path)
    first = saved(model, tmp_path).read_bytes()
    assert model.save(model.module, tmp_path).read_bytes() == first


def with_config(**changes: Any) -> Callable[[Files], Files]:
    return lambda files: files | {"config.json": json.dumps(json.loads(files["config.json"]) | changes).encode()}


def with_files(**changes: bytes) -> Callable[[Files], Files]:
    return lambda files: files | {name.replace("__", "."): content for name, content in changes.items()}


def without(name: str, **others: bytes) -> Callable[[Files], Files]:
    return lambda files: (
        {n: c for n, c in files.items() if n != name} | {n.replace("__", "."): c for n, c in others.items()}
    )


def with_weight(name: str, value: torch.Tensor | None) -> Callable[[Files], Files]:
    def change(files: Files) -> Files:
        state = load(files["model.safetensors"])
        state.pop(name)
        return files | {"model.safetensors": save(state | ({} if value is None else {name: value}), {"format": "pt"})}

    return change


INDEX = b'{"weight_map": {"a": "../../../etc/passwd"}}'


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_config(auto_map={"AutoModel": "evil.Model"}), "auto_map"),
        (with_files(tokenizer_config__json=b'{"auto_map": {"AutoTokenizer": ["evil.T", null]}}'), "auto_map"),
        (with_files(preprocessor_config__json=b'{"auto_map": {"AutoImageProcessor": "evil.P"}}'), "auto_map"),
        (with_files(modeling_evil__py=b"import os"), r"code \('modeling_evil\.py'\)"),
        (without("model.safetensors", pytorch_model__bin=b"x"), "safe_serialization=True"),
        (without("model.safetensors"), r"no model\.safetensors"),
        (without("config.json"), r"no config\.json"),
        (with_config(architectures=["BertForMaskedLM"]), "weights lack"),
        (with_config(architectures=["ResNetForImageClassification"]), "is no model of transformers"),
        (with_config(architectures=["EvilForSequenceClassification"]), "is no model of transformers"),
        (with_config(architectures=None), "architectures"),
        (with_config(model_type="evil"), "model_type 'evil'"),
        (with_config(num_hidden_layers=10**9), "num_hidden_layers"),
        (with_config(hidden_size=4096, intermediate_size=65536), "do not belong together"),
        (with_config(hidden_size=32), "do not fit config"),
        (with_config(num_hidden_layers=3), r"lack 'bert\.encoder\.layer\.2"),
        (
            with_config(hidden_act="os.system"),
            "cannot build the model that config.json describes: KeyError: 'os.system'",
        ),
        (with_config(problem_type="evil"), "problem_type"),
        (with_config(quantization_config={"quant_method": "bitsandbytes"}), "quantized already"),
        (with_files(config__json=b"{"), "no JSON"),
        (with_files(config__json=b"[]"), "no JSON object"),
        (with_files(config__json=b"[" * 100_000), "no JSON"),
        (with_files(tokenizer__json=b"{}"), "tokenizer"),
        (with_files(model__safetensors=b"\x10\0\0\0\0\0\0\0{"), "safetensors header"),
        (with_files(model__safetensors__index__json=INDEX), "not in the folder"),
        (with_weight("classifier.bias", torch.tensor([0.0, float("nan"), 0.0])), r"'classifier\.bias' holds 1 NaN"),
        (with_weight("classifier.bias", None), r"lack 'classifier\.bias'"),
    ],
)
def test_a_spoiled_folder_is_refused(
    tmp_path: Path, bert_folder: tuple[Files, Any], change: Callable[[Files], Files], words: str
) -> None:
    with pytest.raises(ModelRejected, match=words):
        opened(zipped(change(bert_folder[0])), tmp_path)


def test_an_absurd_picture_size_is_refused(tmp_path: Path) -> None:
    vit(tmp_path / "folder")
    files = folder_files(tmp_path / "folder")
    files["preprocessor_config.json"] = json.dumps(PROCESSOR | {"size": {"height": 10**6, "width": 10**6}}).encode()
    with pytest.raises(ModelRejected, match="at most 4096"):
        opened(zipped(files), tmp_path)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"task": "image-classification"}, "BertForSequenceClassification"),
        ({"labels": ["a", "b"]}, "3 outputs and the spec names 2 labels"),
        (
            {
                "task": "text-classification",
                "architecture": {"layers": [{"type": "ReLU"}]},
                "input": {"shape": [1]},
            },
            "leave it out",
        ),
    ],
)
def test_a_spec_that_contradicts_the_folder_is_refused(
    tmp_path: Path, bert_folder: tuple[Files, Any], spec: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelRejected, match=words):
        opened(zipped(bert_folder[0]), tmp_path, spec)


def test_labels_of_the_spec_name_the_classes(tmp_path: Path, bert_folder: tuple[Files, Any]) -> None:
    model = opened(zipped(bert_folder[0]), tmp_path, {"labels": ["bad", "so-so", "good"]})
    assert model.facts.labels == ("bad", "so-so", "good")


def test_paths_and_templates_in_the_folder_are_not_followed(
    tmp_path: Path, bert_folder: tuple[Files, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret.json"
    secret.write_bytes(tokenizer_json().replace(b'"good"', b'"leaked"'))
    config = tokenizer_config(tokenizer_file=str(secret), vocab_file=str(secret), chat_template="{{ 1/0 }}")
    model = opened(zipped(bert_folder[0] | {"tokenizer_config.json": config}), tmp_path)
    assert model.encode(RawBatch(["good leaked"], None))[0].tolist() == [[2, 4, 1, 3]]


def test_a_pretraining_head_that_is_not_used_does_no_harm(tmp_path: Path, bert_folder: tuple[Files, Any]) -> None:
    path = tmp_path / "w"
    save_file(load(bert_folder[0]["model.safetensors"]) | {"cls.head": torch.zeros(3)}, path, {"format": "pt"})
    model = opened(zipped(bert_folder[0] | {"model.safetensors": path.read_bytes()}), tmp_path)
    with zipfile.ZipFile(saved(model, tmp_path)) as archive:
        (tmp_path / "s").write_bytes(archive.read("model.safetensors"))
    assert "cls.head" not in load_file(tmp_path / "s")
