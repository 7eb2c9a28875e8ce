"""Hugging Face folders over HTTP: a text classifier and an image classifier, each into files that others load."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
)

from tests.acceptance.conftest import Service
from tests.acceptance.jobs import run

GOOD = ["a warm and funny film", "what a lovely evening", "great acting, great fun", "a joy from start to end"]
BAD = ["a dull and lazy film", "what a waste of an evening", "poor acting, no fun", "a bore from start to end"]


def zip_folder(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for item in folder.rglob("*"):
            archive.write(item, item.relative_to(folder))
    return path


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A small BERT with a word-piece tokenizer made of the sentences themselves."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(GOOD + BAD, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        num_labels=2,
        id2label={0: "bad", 1: "good"},
        label2id={"bad": 0, "good": 1},
    )
    folder = tmp_path / "bert"
    BertForSequenceClassification(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return zip_folder(folder, tmp_path / "bert.zip")


def test_a_text_classifier_learns_and_becomes_int8(tersor: Service, bert: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "label": label} for label, texts in (("good", GOOD), ("bad", BAD)) for text in texts]
    lines = [row | {"split": split} for split in ("train", "test") for row in rows]
    (tmp_path / "films.jsonl").write_text("\n".join(map(json.dumps, lines)))
    steps = [
        {"technique": "finetune", "training": {"epochs": 60, "lr": 2e-3, "batch_size": 4}},
        {"technique": "quantize", "method": "dynamic"},
    ]
    with tersor.client() as client:
        model = client.upload_model(bert)["id"]
        dataset = client.upload_dataset(tmp_path / "films.jsonl")["id"]
        done, report = run(client, model, dataset, steps=steps)
        native = client.download(done["id"], "model.zip", tmp_path)
        onnx = client.download(done["id"], "model.onnx", tmp_path)
    accuracy = {item["name"]: item["measurement"]["metric"]["value"] for item in report["artifacts"]}
    assert accuracy["model.zip"] == 1.0  # eight sentences can be learnt by heart

    folder = tmp_path / "reloaded"
    zipfile.ZipFile(native).extractall(folder)
    again = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = AutoTokenizer.from_pretrained(folder)(GOOD + BAD, padding=True, return_tensors="pt")
    logits = again(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    names = [again.config.id2label[int(i)] for i in logits.argmax(-1)]
    assert names == ["good"] * 4 + ["bad"] * 4

    session = onnxruntime.InferenceSession(str(onnx), providers=["CPUExecutionProvider"])
    wanted = {tensor.name: np.asarray(batch[tensor.name]) for tensor in session.get_inputs()}
    (int8,) = session.run(None, wanted)
    assert float((int8.argmax(-1) == logits.argmax(-1).numpy()).mean()) >= accuracy["model.onnx"] - 1e-9


def test_an_image_classifier_is_pruned_and_quantized(tersor: Service, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=2, layer_type="basic", num_channels=3
    )
    config.id2label, config.label2id = {0: "dark", 1: "light"}, {"dark": 0, "light": 1}
    folder = tmp_path / "resnet"
    ResNetForImageClassification(config).save_pretrained(folder)
    preprocessor = {
        "image_processor_type": "ConvNextImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 32},
        "crop_pct": 1.0,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, level in (("dark", 60), ("light", 190)):
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for i in range(12):
                noise = rng.normal(level, 30, (40, 40, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(noise).save(tmp_path / "images" / split / label / f"{i}.png")
    steps = [
        {"technique": "prune", "sparsity": 0.5, "training": {"epochs": 6, "lr": 5e-3, "batch_size": 6}},
        {"technique": "quantize"},
    ]
    with tersor.client() as client:
        model = client.upload_model(zip_folder(folder, tmp_path / "resnet.zip"))["id"]
        dataset = client.upload_dataset(zip_folder(tmp_path / "images", tmp_path / "images.zip"))["id"]
        done, report = run(client, model, dataset, steps=steps)
        native = client.download(done["id"], "model.zip", tmp_path)
    accuracy = {item["name"]: item["measurement"]["metric"]["value"] for item in report["artifacts"]}
    assert accuracy["model.zip"] >= 0.9
    assert accuracy["model.onnx"] >= 0.9
    zipfile.ZipFile(native).extractall(tmp_path / "again")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "again")
    weights = [p for p in again.parameters() if p.dim() > 1]
    zeros, total = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    assert zeros == round(0.5 * total)
