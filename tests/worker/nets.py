"""Networks whose figures are known by hand or from the literature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from app.contract.facts import TensorFacts
from tests.worker.helpers import tiny_model
from worker.model import Model

IDS = TensorFacts(name="input_ids", shape=(None,), dtype="int64")
MASK = TensorFacts(name="attention_mask", shape=(None,), dtype="int64")


def lenet(*, seed: int = 0) -> nn.Sequential:
    """LeNet-5 (LeCun et al. 1998) with ReLU and max pooling, for [batch, 1, 28, 28]: 61,706 parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


# By hand: 28*28*6*25 + 10*10*16*6*25 + 400*120 + 120*84 + 84*10.
LENET_MACS = 117_600 + 240_000 + 48_000 + 10_080 + 840


class Positional(nn.Module):
    """A transformers model that takes its inputs by position and gives logits."""

    def __init__(self, inner: nn.Module, *names: str) -> None:
        super().__init__()
        self.inner = inner
        self.names = names

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.inner(**dict(zip(self.names, inputs, strict=True))).logits
        return logits


class Recurrent(nn.Module):
    """Embedding -> LSTM or GRU -> Linear on the last step."""

    def __init__(self, layer: type[nn.LSTM] | type[nn.GRU], **options: Any) -> None:
        super().__init__()
        self.emb = nn.Embedding(50, 16)
        self.rnn = layer(16, 24, batch_first=True, **options)
        self.fc = nn.Linear(24 * (2 if self.rnn.bidirectional else 1), 4)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.fc(self.rnn(self.emb(ids))[0][:, -1])
        return out


def bert(*, hidden: int = 32, layers: int = 2, inner: int = 64, seed: int = 0) -> Positional:
    """A small random BERT for sequences of up to 64 tokens, 3 classes."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=inner,
        vocab_size=100,
        max_position_embeddings=64,
        num_labels=3,
    )
    return Positional(BertForSequenceClassification(config).eval(), "input_ids", "attention_mask")


def resnet18(*, seed: int = 0) -> Positional:
    """ResNet-18 (He et al. 2016) for [batch, 3, 224, 224], 1,000 classes."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(seed)
    config = ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=1000)
    return Positional(ResNetForImageClassification(config).eval(), "pixel_values")


def model_of(module: nn.Module, *inputs: TensorFacts, classes: int) -> Model:
    """A Model with the given inputs."""
    model = tiny_model(module.eval(), classes=classes)
    return Model(module, model.facts.model_copy(update={"inputs": inputs}), model.encode, model.save, model.task)


def text_model(module: nn.Module, *, classes: int) -> Model:
    """A Model over token ids alone."""
    return model_of(module, IDS, classes=classes)
