"""Smaller copies of models of transformers: layers left out, whole heads kept, weights taken over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from app.contract.errors import Unsupported
from worker.students.configs import has_layers, shrunk
from worker.students.depths import chosen, spread
from worker.students.inherited import inherited

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}
IDS = torch.tensor([[3, 4, 5, 6]])


def bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=3))


def llama() -> Any:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=24, n_layer=4, n_head=4, vocab_size=50, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def distilbert() -> Any:
    config = transformers.DistilBertConfig(dim=24, n_layers=4, n_heads=4, hidden_dim=40, vocab_size=50)
    return transformers.DistilBertForSequenceClassification(config)


def vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=4, intermediate_size=40, image_size=16, patch_size=8
    )
    return transformers.ViTForImageClassification(config)


def whisper() -> Any:
    config = transformers.WhisperConfig(
        d_model=24,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        vocab_size=50,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return transformers.WhisperForConditionalGeneration(config)


def resnet() -> Any:
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[2, 3], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


MODELS: dict[str, Callable[[], Any]] = {
    made.__name__: made for made in (bert, llama, gpt2, distilbert, vit, whisper, resnet)
}


def inputs(name: str) -> dict[str, Tensor]:
    if name in ("vit", "resnet"):
        return {"pixel_values": torch.randn(1, 3, 16, 16)}
    if name == "whisper":
        return {"input_features": torch.randn(1, 8, 32), "decoder_input_ids": IDS}
    return {"input_ids": IDS}


def copied(large: Any, width: float, depth: float) -> tuple[Any, dict[str, str]]:
    plan = shrunk(large.config.to_dict(), large.config, width, depth)
    small = type(large)(type(large.config).from_dict(plan.config)).eval()
    state, kept = inherited(small.state_dict(), large.state_dict(), plan)
    small.load_state_dict(state)
    return small, kept


def count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("width", "depth"), [(0.5, 1.0), (1.0, 0.5), (0.5, 0.5)])
def test_a_smaller_copy_runs(name: str, width: float, depth: float) -> None:
    torch.manual_seed(0)
    large = MODELS[name]().eval()
    assert has_layers(large.config)
    small, kept = copied(large, width, depth)
    with torch.no_grad():
        ours, theirs = small(**inputs(name)).logits, large(**inputs(name)).logits
    assert ours.shape == theirs.shape
    assert bool(ours.isfinite().all())
    assert count(small) < 0.75 * count(large)
    assert bool(kept) == (depth < 1)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "whisper"])
def test_left_out_layers_are_all_that_differs_in_a_shallower_copy(name: str) -> None:
    torch.manual_seed(0)
    large = MODELS[name]().eval()
    small, kept = copied(large, 1.0, 0.5)
    assert {old.rpartition(".")[2] for old in kept.values()} == {"3"}  # 0 and 3 of four
    for path, module in list(large.named_modules()):
        if isinstance(module, torch.nn.ModuleList):
            large.set_submodule(path, torch.nn.ModuleList([module[0], module[3]]))
    for key in ("num_hidden_layers", "encoder_layers", "decoder_layers"):
        if hasattr(large.config, key):
            setattr(large.config, key, 2)
    small.config.use_cache = large.config.use_cache = False  # a cache goes by the numbers of layers
    with torch.no_grad():
        given = inputs(name)
        torch.testing.assert_close(small(**given).logits, large(**given).logits)


def numbered(model: Any) -> None:
    """Every matrix says at each place which row and column it was."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            rows, columns = parameter.shape
            parameter.data = torch.arange(rows)[:, None] * 1000.0 + torch.arange(columns) + 1


def places(weight: Tensor) -> tuple[list[int], list[int]]:
    """The rows and columns that a numbered matrix was cut from; fails where it is no cut of whole ones."""
    whole = weight.long() - 1
    rows, columns = whole[:, 0] // 1000, whole[0] % 1000
    assert torch.equal(whole, rows[:, None] * 1000 + columns)
    return rows.tolist(), columns.tolist()


def test_features_are_cut_alike_everywhere_and_heads_stay_whole() -> None:
    large = bert()
    numbered(large)
    with torch.no_grad():  # of four heads of six features, the second and the fourth have the largest weights
        for parameter in large.parameters():
            for dim, size in enumerate(parameter.shape if parameter.ndim == 2 else ()):
                if size == 24:
                    parameter.movedim(dim, 0).view(4, 6, -1)[[0, 2]] *= 1e-6
    small, _ = copied(large, 0.5, 1.0)
    hidden = [*range(6, 12), *range(18, 24)]
    state = small.state_dict()
    prefix = "bert.encoder.layer.1."
    assert places(state["bert.embeddings.word_embeddings.weight"]) == (list(range(50)), hidden)
    assert places(state[f"{prefix}attention.self.query.weight"]) == (hidden, hidden)
    inner, columns = places(state[f"{prefix}intermediate.dense.weight"])
    assert (len(inner), columns) == (20, hidden)
    assert places(state[f"{prefix}output.dense.weight"]) == (hidden, inner)
    assert places(state["classifier.weight"]) == ([0, 1, 2], hidden)


def test_heads_that_share_keys_and_values_are_kept_together() -> None:
    large = llama()
    numbered(large)
    small, _ = copied(large, 0.5, 1.0)
    state = small.state_dict()
    rows, _ = places(state["model.layers.0.self_attn.q_proj.weight"])
    values, _ = places(state["model.layers.0.self_attn.v_proj.weight"])
    # The second of two groups has the larger numbers: query heads 2 and 3, and its one head of keys and values.
    assert (rows, values) == (list(range(12, 24)), list(range(6, 12)))
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (2, 1)


def test_queries_keys_and_values_in_one_matrix_are_cut_alike() -> None:
    large = gpt2()
    numbered(large)
    small, _ = copied(large, 0.5, 1.0)
    _, columns = places(small.state_dict()["transformer.h.0.attn.c_attn.weight"])
    assert columns[12:24] == [24 + i for i in columns[:12]]
    assert columns[24:] == [48 + i for i in columns[:12]]


def test_configs_without_the_words_are_refused_with_advice() -> None:
    config = transformers.MobileNetV2Config()
    with pytest.raises(Unsupported, match="shrink: depth"):
        shrunk(config.to_dict(), config, 0.5, 1.0)
    with pytest.raises(Unsupported, match="shrink: width"):
        shrunk(config.to_dict(), config, 1.0, 0.5)


def test_a_weight_that_cannot_be_followed_is_named() -> None:
    """Wav2Vec2's positions are convolved in groups of a fixed number."""
    config = transformers.Wav2Vec2Config(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        conv_dim=(8, 8),
        conv_stride=(2, 2),
        conv_kernel=(3, 3),
        num_conv_pos_embedding_groups=4,
        num_conv_pos_embeddings=4,
        vocab_size=10,
    )
    large = transformers.Wav2Vec2ForCTC(config)
    with pytest.raises(Unsupported, match="not known"):
        copied(large, 0.5, 1.0)
    small, _ = copied(large, 1.0, 0.5)
    assert small.config.num_hidden_layers == 1


@pytest.mark.parametrize(
    ("count", "left", "places"), [(6, 1, [0]), (6, 2, [0, 5]), (6, 3, [0, 2, 5]), (4, 4, [0, 1, 2, 3])]
)
def test_what_is_left_is_spread(count: int, left: int, places: list[int]) -> None:
    assert spread(count, left) == places
    assert chosen(count, left / count) == places
