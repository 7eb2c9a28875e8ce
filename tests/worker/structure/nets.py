"""Small networks of the kinds whose units may leave them, with inputs, and inputs of another batch and length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import transformers as T  # noqa: N812
from torch import Tensor, nn

from worker.data.batch import Inputs
from worker.structure.groups import Group, Structure, structure_of
from worker.structure.sound import standing

Made = tuple[nn.Module, Inputs, Inputs]
MANY = ("mobilenet_v2", "efficientnet")  # of which too many groups differ to try each in a test


@dataclass(frozen=True)
class Found:
    """A network, what was found of it, and which groups may lose units; nobody changes it."""

    module: nn.Module
    inputs: tuple[Inputs, Inputs]
    structure: Structure
    groups: list[Group]
    why: dict[str, str]


def images(channels: int = 3, size: int = 8) -> tuple[Inputs, Inputs]:
    return (torch.randn(2, channels, size, size),), (torch.randn(3, channels, size, size),)


def tokens(vocabulary: int = 50) -> tuple[Inputs, Inputs]:
    return (torch.randint(1, vocabulary, (2, 9)),), (torch.randint(1, vocabulary, (3, 6)),)


def sequences(width: int) -> tuple[Inputs, Inputs]:
    return (torch.randn(2, 9, width),), (torch.randn(3, 6, width),)


def lenet() -> nn.Sequential:
    """LeNet-5 as Caffe has it: 20 and 50 channels, 500 neurons."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


def chain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 14), nn.PReLU(14), nn.Linear(14, 5),
    )  # fmt: skip


class Residual(nn.Module):
    """What is added is one group; the layer between is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.norm = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.second, self.head = nn.Conv2d(6, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x += self.second(F.relu(self.norm(self.first(x)), inplace=True))
        return self.head(x.relu_().mean((2, 3)))


def depthwise() -> nn.Sequential:
    """A channel of a depthwise layer goes with the one that comes in."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 16, 3, padding=1, groups=8), nn.Conv2d(16, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 5),
    )  # fmt: skip


def grouped() -> nn.Sequential:
    """Of each of four groups the same channel goes: ResNeXt."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(24, 6, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


def transposed() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.ReLU(),
        nn.ConvTranspose2d(6, 6, 3, padding=1, groups=2), nn.Conv2d(6, 2, 1),
    )  # fmt: skip


class Concatenated(nn.Module):
    """DenseNet: each layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first, self.second = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(10, 5, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(15), nn.Linear(15, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.first(F.relu(x))], 1)
        x = torch.cat([x, self.second(F.relu(x))], 1)
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


class Excited(nn.Module):
    """Squeeze-and-excitation: factors of channels are made of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.up = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.last, self.head = nn.Conv2d(8, 6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x * torch.sigmoid(self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(self.last(x).mean((2, 3)))


def group_norm() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.GroupNorm(6, 6), nn.ReLU(),
        nn.Flatten(), nn.Linear(96, 5),
    )  # fmt: skip


class Shuffled(nn.Module):
    """ShuffleNet: channels change places between two layers in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 18, 3, padding=1, groups=3)
        self.second, self.head = nn.Conv2d(18, 12, 3, padding=1, groups=3), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(F.relu(self.stem(x)))
        batch, channels, high, wide = x.shape
        x = x.view(batch, 3, channels // 3, high, wide).transpose(1, 2).reshape(batch, channels, high, wide)
        return self.head(self.second(x).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, layer: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(50, 12), layer(12, 8, batch_first=True, **options)
        shown = (options.get("proj_size") or 8) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(shown, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layer(self.table(ids))[0].mean(1))


class Tied(nn.Module):
    """The table is the head's weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(50, 12), nn.Linear(12, 16), nn.Linear(16, 12)
        self.head = nn.Linear(12, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(x + self.down(F.gelu(self.up(x))))


class Gated(nn.Module):
    """GLU: one layer gives values and gates, a half each."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.out, self.head = nn.Linear(10, 24), nn.Linear(12, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.both(x).chunk(2, -1)
        return self.head(F.relu(self.out(value * torch.sigmoid(gate))))


class Attention(nn.Module):
    """Written by hand: 4 heads of 4, or fewer of keys and values, where the number or the size of `heads` is in the
    code; `rotary` turns halves of each head."""

    def __init__(self, *, kv: int = 4, rotary: bool = False, heads: int = -1, size: int = 4) -> None:
        super().__init__()
        self.kv, self.rotary, self.heads, self.size = kv, rotary, heads, size
        self.q, self.k, self.v = nn.Linear(10, 16), nn.Linear(10, 4 * kv), nn.Linear(10, 4 * kv)
        self.out, self.head = nn.Linear(16, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            layer(x).view(batch, length, self.heads, self.size).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        if self.rotary:
            q, k = self.turned(q), self.turned(k)
        if self.kv < 4:
            k, v = (one.repeat_interleave(4 // self.kv, 1) for one in (k, v))
        attended = torch.softmax(q @ k.mT / 2, -1) @ v
        y = attended.transpose(1, 2).reshape(batch, length, -1)
        return self.head(x + self.out(y))

    def turned(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2])[:, None] * torch.tensor([1.0, 0.1])
        cos, sin = (torch.cat([own, own], -1) for own in (angles.cos(), angles.sin()))
        half = x.shape[-1] // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Padded(nn.Module):
    """ResNet's shortcut of option A: zeros for the channels that are new (He et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 12, 3, 2, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 3))
        return self.head(F.relu(short + self.up(F.relu(x))).mean((2, 3)))


class Logits(nn.Module):
    """A transformers model by position, whose first output is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Tensor:
        first: Tensor = self.inner(*inputs)[0]
        return first


SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
}  # fmt: skip
WAVES: dict[str, Any] = {
    "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
WHISPER: dict[str, Any] = {
    "vocab_size": 50, "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 20,
    "max_source_positions": 30, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "classifier_proj_size": 16,
}  # fmt: skip

OWN: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Inputs, Inputs]]]] = {
    "lenet": (lenet, lambda: images(1, 28)),
    "chain": (chain, images),
    "residual": (Residual, images),
    "depthwise": (depthwise, images),
    "grouped": (grouped, images),
    "transposed": (transposed, images),
    "concatenated": (Concatenated, images),
    "excited": (Excited, images),
    "group_norm": (group_norm, images),
    "shuffled": (Shuffled, images),
    "lstm": (lambda: Recurrent(nn.LSTM), tokens),
    "lstm_deep": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), tokens),
    "lstm_projected": (lambda: Recurrent(nn.LSTM, num_layers=2, proj_size=6), tokens),
    "gru": (lambda: Recurrent(nn.GRU, num_layers=2), tokens),
    "gru_both_ways": (lambda: Recurrent(nn.GRU, bidirectional=True), tokens),
    "tied": (Tied, tokens),
    "gated": (Gated, lambda: sequences(10)),
    "attention": (Attention, lambda: sequences(10)),
    "attention_gqa": (lambda: Attention(kv=2), lambda: sequences(10)),
    "attention_rotary": (lambda: Attention(rotary=True), lambda: sequences(10)),
    "padded": (Padded, images),
}
PUBLIC: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Inputs, Inputs]]]] = {
    "bert": (lambda: T.BertForSequenceClassification(T.BertConfig(vocab_size=50, **SMALL)), tokens),
    "distilbert": (
        lambda: T.DistilBertForSequenceClassification(
            T.DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=24)
        ),
        tokens,
    ),
    "gpt2": (lambda: T.GPT2LMHeadModel(T.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4)), tokens),
    "llama": (lambda: T.LlamaForCausalLM(T.LlamaConfig(vocab_size=50, num_key_value_heads=2, **SMALL)), tokens),
    "vit": (
        lambda: T.ViTForImageClassification(T.ViTConfig(image_size=16, patch_size=8, **SMALL)),
        lambda: images(3, 16),
    ),
    "swin": (
        lambda: T.SwinForImageClassification(
            T.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
        ),
        lambda: images(3, 32),
    ),
    "convnext": (
        lambda: T.ConvNextForImageClassification(
            T.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, layer_scale_init_value=1.0)
        ),
        lambda: images(3, 32),
    ),
    "resnet": (
        lambda: T.ResNetForImageClassification(
            T.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], layer_type="bottleneck")
        ),
        lambda: images(3, 32),
    ),
    "mobilenet_v2": (
        lambda: T.MobileNetV2ForImageClassification(T.MobileNetV2Config(image_size=32, depth_multiplier=0.25)),
        lambda: images(3, 32),
    ),
    "efficientnet": (
        lambda: T.EfficientNetForImageClassification(
            T.EfficientNetConfig(image_size=32, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320)
        ),
        lambda: images(3, 32),
    ),
    "whisper": (
        lambda: T.WhisperForAudioClassification(T.WhisperConfig(**WHISPER)),
        lambda: ((torch.randn(2, 20, 60),), (torch.randn(3, 20, 60),)),
    ),
    "wav2vec2": (
        lambda: T.Wav2Vec2ForSequenceClassification(T.Wav2Vec2Config(vocab_size=50, **WAVES, **SMALL)),
        lambda: ((torch.randn(2, 400),), (torch.randn(3, 300),)),
    ),
}  # fmt: skip


def network(name: str) -> Made:
    """In eval mode, with statistics as of training and weights of which each says something."""
    torch.manual_seed(0)
    make, inputs = OWN.get(name) or PUBLIC[name]
    module = make() if name in OWN else Logits(make())
    own, other = inputs()
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn_like(weight) * (0.1 if weight.std() > 0.05 or weight.ndim < 2 else 0.2))
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 1.0
        module.train()(*own)
    return module.eval(), own, other


@cache
def found(name: str) -> Found:
    """Once for all tests of a process."""
    module, own, other = network(name)
    structure = structure_of(module, own)
    if name in MANY:
        return Found(module, (own, other), structure, list(structure.groups), {})
    return Found(module, (own, other), structure, *standing(module, own, structure))
