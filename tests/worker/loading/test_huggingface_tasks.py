"""A small model of every task: equal outputs after load and save, in ONNX as in torch, and something to learn from."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from app.contract.errors import DatasetMismatch, ModelRejected
from app.contract.facts import DataKind, Task
from tests.worker.loading.files import TEXTS, WORDS, tokenizer_config, tokenizer_json, zipped
from worker.constraints import baked
from worker.data.base import RawBatch, RawTargets, Sound
from worker.data.batch import IGNORED, Batch
from worker.export.onnx import export_onnx
from worker.loading import load_model
from worker.model import Model
from worker.techniques.pruning.selection_math import lowest_overall, removals
from worker.techniques.pruning.weights import WeightSet, prunable
from worker.training.distillation import combined

RATE = 16_000
LETTERS = {"<pad>": 0, "<unk>": 1, "|": 2, **{letter: i for i, letter in enumerate("ABCDE", start=3)}}
MASKED = tokenizer_config(mask_token="[MASK]")
BERT = {
    "vocab_size": len(WORDS) + 1,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
TINY_WAV2VEC = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8, 8),
    "conv_stride": (10, 8),
    "conv_kernel": (20, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}


def sounds(*lengths: int, rate: int = RATE) -> list[Sound]:
    random = torch.Generator().manual_seed(0)
    return [Sound(torch.rand(length, generator=random) * 2 - 1, rate) for length in lengths]


def text_files(folder: Path, config: bytes = MASKED) -> None:
    (folder / "tokenizer.json").write_bytes(tokenizer_json())
    (folder / "tokenizer_config.json").write_bytes(config)


def make(kind: str, config: Any, folder: Path) -> Any:
    torch.manual_seed(0)
    module = getattr(transformers, kind)(config).eval()
    module.save_pretrained(folder)
    return module


def token_classifier(folder: Path) -> Any:
    text_files(folder)
    return make("BertForTokenClassification", transformers.BertConfig(**BERT, num_labels=4), folder)


def masked(folder: Path) -> Any:
    text_files(folder)
    return make("BertForMaskedLM", transformers.BertConfig(**BERT), folder)


def llama(folder: Path) -> Any:
    text_files(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS) + 1,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return make("LlamaForCausalLM", config, folder)


def gpt2(folder: Path) -> Any:
    text_files(folder)
    config = transformers.GPT2Config(vocab_size=len(WORDS) + 1, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    return make("GPT2LMHeadModel", config, folder)


def sentence_encoder(folder: Path) -> Any:
    text_files(folder)
    module = make("BertModel", transformers.BertConfig(**BERT), folder)
    names = ("Transformer", "Pooling", "Normalize")
    modules = [{"idx": i, "path": "", "type": f"sentence_transformers.models.{name}"} for i, name in enumerate(names)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 5}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return module


def several_labels(folder: Path) -> Any:
    text_files(folder)
    config = transformers.BertConfig(**BERT, num_labels=3, problem_type="multi_label_classification")
    return make("BertForSequenceClassification", config, folder)


def two_numbers(folder: Path) -> Any:
    text_files(folder)
    config = transformers.BertConfig(**BERT, num_labels=2, problem_type="regression")
    return make("BertForSequenceClassification", config, folder)


def ctc(folder: Path) -> Any:
    config = transformers.Wav2Vec2Config(**TINY_WAV2VEC, vocab_size=len(LETTERS), pad_token_id=0)
    module = make("Wav2Vec2ForCTC", config, folder)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(LETTERS))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), bos_token=None, eos_token=None)
    tokenizer.save_pretrained(folder)
    return module


def sound_classifier(folder: Path) -> Any:
    config = transformers.Wav2Vec2Config(**TINY_WAV2VEC, num_labels=3, classifier_proj_size=8)
    module = make("Wav2Vec2ForSequenceClassification", config, folder)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return module


def spectrogram_classifier(folder: Path) -> Any:
    config = transformers.ASTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_length=64,
        num_mel_bins=32,
        num_labels=3,
    )
    module = make("ASTForAudioClassification", config, folder)
    transformers.ASTFeatureExtractor(max_length=64, num_mel_bins=32).save_pretrained(folder)
    return module


def whisper(folder: Path) -> Any:
    config = transformers.WhisperConfig(
        vocab_size=len(WORDS),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=80,
        max_source_positions=100,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=2,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    module = make("WhisperForConditionalGeneration", config, folder)
    transformers.WhisperFeatureExtractor(chunk_length=2).save_pretrained(folder)
    text_files(folder)
    return module


@dataclass(frozen=True)
class Case:
    """A model, what it is fed, and what its own code answers to the inputs that come of that."""

    make: Callable[[Path], Any]
    task: Task
    kind: DataKind
    samples: Any
    targets: RawTargets | None
    answer: Callable[[Any, dict[str, Tensor]], Tensor] = field(default=lambda module, named: module(**named).logits)
    classes: int = 3

    def raw(self) -> RawBatch:
        return RawBatch(self.samples, self.targets)


def pooled(module: Any, named: dict[str, Tensor]) -> Tensor:
    states, weights = module(**named).last_hidden_state, named["attention_mask"][..., None]
    return functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


WORDS_IN = [["good", "film"], ["very", "bad", "the", "film"]]
TAGS = [torch.tensor([0, 1]), torch.tensor([2, 3, 0, 1])]
CASES = {
    "token classifier": Case(token_classifier, "token-classification", "tokens", WORDS_IN, TAGS, classes=4),
    "masked lm": Case(masked, "masked-lm", "text", TEXTS, None, classes=11),
    "llama": Case(llama, "causal-lm", "text", TEXTS, None, classes=11),
    "gpt2": Case(gpt2, "causal-lm", "text", TEXTS, None, classes=11),
    "sentence encoder": Case(
        sentence_encoder, "sentence-embedding", "text", TEXTS, torch.tensor([0, 1]), pooled, classes=16
    ),
    "several labels": Case(several_labels, "multi-label", "text", TEXTS, torch.tensor([[0.0, 1, 1], [1, 0, 0]])),
    "two numbers": Case(two_numbers, "regression", "text", TEXTS, torch.tensor([[0.5, -1.0], [2.0, 0.0]]), classes=2),
    "ctc": Case(ctc, "speech-recognition", "audio", sounds(4000, 3000), ["ab", "c d"], classes=8),
    "sound classifier": Case(
        sound_classifier, "audio-classification", "audio", sounds(2000, 3000), torch.tensor([0, 2])
    ),
    "spectrogram classifier": Case(
        spectrogram_classifier, "audio-classification", "audio", sounds(8000, 9000), torch.tensor([0, 2])
    ),
    "whisper": Case(whisper, "speech-recognition", "audio", sounds(8000, 9000), ["good film", "bad"], classes=10),
}


@pytest.fixture(scope="module", params=list(CASES))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Any, Model]:
    case, scratch = CASES[request.param], tmp_path_factory.mktemp("scratch")
    folder = scratch / "folder"
    folder.mkdir()
    module = case.make(folder)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (scratch / "upload").write_bytes(zipped(files))
    return case, module, load_model(scratch / "upload", "upload.zip", {}, scratch)


def named(model: Model, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {tensor.name: value for tensor, value in zip(model.facts.inputs, inputs, strict=True)}


def test_outputs_are_the_models_own(loaded: tuple[Case, Any, Model], tmp_path: Path) -> None:
    case, module, model = loaded
    assert (model.facts.task, model.facts.classes) == (case.task, case.classes)
    assert model.facts.accepts == ("arrays", case.kind)
    inputs = model.encode(case.raw())
    again = load_model(model.save(model.module, tmp_path), "again.zip", {}, tmp_path)
    with torch.no_grad():
        expected = case.answer(module, named(model, inputs))
        assert torch.equal(model.module(*inputs), expected)
        assert torch.equal(again.module(*inputs), expected)
    assert again.facts == model.facts
    assert all(torch.equal(a, b) for a, b in zip(again.encode(case.raw()), inputs, strict=True))


def test_onnx_says_the_same(loaded: tuple[Case, Any, Model], tmp_path: Path) -> None:
    case, _, model = loaded
    inputs = model.encode(case.raw())
    path = export_onnx(model.module, model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(path))
    for batch in (inputs, tuple(tensor[:1] for tensor in inputs)):
        (found,) = session.run(None, {name: tensor.numpy() for name, tensor in named(model, batch).items()})
        with torch.no_grad():
            np.testing.assert_allclose(found, model.module(*batch).numpy(), atol=1e-4)


def test_it_learns_from_targets_and_from_a_teacher(loaded: tuple[Case, Any, Model]) -> None:
    case, _, model = loaded
    inputs = model.encode(case.raw())
    task = model.task
    batch = task.prepare(Batch(inputs, task.targets(case.raw(), inputs)), torch.Generator().manual_seed(3))
    outputs = model.module(*batch.inputs)
    teacher = outputs.detach() + torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0))
    said = task.divergence(outputs, teacher, batch, 4.0)
    found = [combined(task, outputs, said, batch, 0.7)]
    found += [task.loss(outputs, batch)] if task.supervised else []
    for loss in found:
        (gradient,) = torch.autograd.grad(loss, outputs, retain_graph=True)
        assert loss.item() > 0
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0
    assert task.divergence(outputs, outputs.detach(), batch, 2.0).item() == pytest.approx(0, abs=1e-6)


def test_half_of_it_can_be_removed(loaded: tuple[Case, Any, Model], tmp_path: Path) -> None:
    """Also of networks with parametrizations of their own, whose files name the parts: Wav2Vec2's weight norm."""
    case, _, model = loaded
    pruned = copy.deepcopy(model.module)
    weights = WeightSet(pruned, prunable(pruned))
    weights.drop(lowest_overall([value.abs() for value in weights.values()], weights.kept(), 0.5))
    again = load_model(model.save(baked(pruned), tmp_path), "again.zip", {}, tmp_path)
    left = [weight.value() for weight in prunable(again.module)]
    assert sum(int((value == 0).sum()) for value in left) == removals(sum(value.numel() for value in left), 0.5)
    inputs = model.encode(case.raw())
    with torch.no_grad():
        assert torch.equal(again.module(*inputs), pruned(*inputs))
        assert not torch.equal(again.module(*inputs), model.module(*inputs))


def opened(case: str, scratch: Path, spec: dict[str, Any] | None = None, **changes: bytes | None) -> Model:
    folder = scratch / "folder"
    folder.mkdir()
    CASES[case].make(folder)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name, content in changes.items():
        files[name.replace("__", "/").replace("_json", ".json")] = content or b""
        if content is None:
            del files[name.replace("__", "/").replace("_json", ".json")]
    (scratch / "upload").write_bytes(zipped(files))
    return load_model(scratch / "upload", "upload.zip", spec or {}, scratch)


def test_sound_is_resampled_to_the_models_rate(tmp_path: Path) -> None:
    model = opened("sound classifier", tmp_path)
    time = torch.arange(RATE) / RATE
    exact = torch.sin(2 * torch.pi * 440 * time)
    there = model.encode(RawBatch([Sound(exact, RATE)], None))[0]
    half = model.encode(RawBatch([Sound(exact[::2].contiguous(), RATE // 2)], None))[0]
    assert half.shape == there.shape
    middle = slice(RATE // 4, 3 * RATE // 4)
    torch.testing.assert_close(half[:, middle], there[:, middle], atol=1e-2, rtol=0)


def test_transcripts_are_spelt_in_the_models_letters(tmp_path: Path) -> None:
    model = opened("ctc", tmp_path)
    raw = RawBatch(sounds(4000, 3000), ["ab", "C d"])
    targets = model.task.targets(raw, model.encode(raw))
    assert targets is not None
    assert targets.tolist() == [[3, 4, IGNORED], [5, 2, 6]]


def test_texts_for_sentences_are_cut_where_the_folder_says(tmp_path: Path) -> None:
    model = opened("sentence encoder", tmp_path)
    assert model.encode(RawBatch(["good " * 20], None))[0].shape == (1, 5)


def test_an_encoder_without_a_head_needs_to_be_told(tmp_path: Path) -> None:
    with pytest.raises(ModelRejected, match="sentence-embedding"):
        opened("sentence encoder", tmp_path, modules_json=None)


def test_an_encoder_without_a_head_gives_the_mean_of_its_states(tmp_path: Path) -> None:
    model = opened("sentence encoder", tmp_path, {"task": "sentence-embedding"}, modules_json=None)
    assert model.facts.task == "sentence-embedding"


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("sentence encoder", {"modules_json": b'[{"type": "x.models.Evil"}]'}, "Evil"),
        ("sentence encoder", {"modules_json": b"{"}, "no JSON"),
        ("sentence encoder", {"1_Pooling__config_json": b"{}"}, "no pooling"),
        ("ctc", {"preprocessor_config_json": None}, "preprocessor_config"),
        ("ctc", {"preprocessor_config_json": b'{"feature_extractor_type": "Evil"}'}, "feature extractor"),
        ("ctc", {"vocab_json": b"[]", "tokenizer_config_json": b"{}"}, "tokenizer"),
        ("masked lm", {"tokenizer_config_json": tokenizer_config()}, "mask_token"),
        ("masked lm", {"tokenizer_json": None}, "tokenizer.json"),
    ],
)
def test_a_folder_that_lacks_what_its_task_needs_is_refused(
    tmp_path: Path, case: str, changes: dict[str, bytes | None], words: str
) -> None:
    with pytest.raises(ModelRejected, match=words):
        opened(case, tmp_path, **changes)


@pytest.mark.parametrize("case", ["ctc", "whisper", "token classifier", "llama"])
def test_samples_of_another_kind_are_refused(tmp_path: Path, case: str) -> None:
    wrong: Any = TEXTS if CASES[case].kind != "text" else sounds(100)
    with pytest.raises(DatasetMismatch, match="another kind"):
        opened(case, tmp_path).encode(RawBatch(wrong, None))
