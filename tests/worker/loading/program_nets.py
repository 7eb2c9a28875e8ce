"""Hand-written networks that are exported, and how they are fed and trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.worker.loading.programs import ConvNet, image
from tests.worker.nets import Recurrent

MARKS = [
    pytest.mark.usefixtures("plain_attention"),
    pytest.mark.filterwarnings("ignore:The tensor attributes"),  # torch's word on exporting recurrent layers
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # torch's own, in run_decompositions
]


class Encoder(nn.Module):
    """A transformer encoder over token ids, with its weights in nn.MultiheadAttention and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 16, padding_idx=0)
        self.position = nn.Parameter(torch.randn(1, 32, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.position[:, : ids.shape[1]]
        logits: Tensor = self.head(self.encoder(x).mean(1))
        return logits


class Norms(nn.Module):
    """Layers of many kinds, for [batch, 2, 16]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(2, 8, 3, padding="same", dilation=2)
        self.up = nn.ConvTranspose1d(8, 8, 2, stride=2, output_padding=1, dilation=2)
        self.batch = nn.BatchNorm1d(8, affine=False)
        self.instance = nn.InstanceNorm1d(8, affine=True)
        self.group = nn.GroupNorm(2, 8)
        self.channels = nn.Dropout1d(0.1)
        self.prelu = nn.PReLU(8)
        self.layer = nn.LayerNorm(8, bias=False)
        self.rms = nn.RMSNorm(8)
        self.alpha = nn.AlphaDropout(0.1)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.group(self.instance(self.batch(self.up(self.conv(x)))))
        x = self.rms(self.layer(self.prelu(self.channels(x)).transpose(1, 2)))
        x = self.alpha(self.normed(self.cross(x, x, x, need_weights=False)[0]))
        logits: Tensor = self.head(x.mean(1))
        return logits


class Tied(nn.Module):
    """The output layer has the embedding's weight, and the same block runs twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 8)
        self.block = nn.Linear(8, 8)
        self.output = nn.Linear(8, 10, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.block(torch.relu(self.block(self.embedding(ids)))).mean(1)
        logits: Tensor = self.output(x)
        return logits


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 3))


def token_ids(batch: int = 3, length: int = 8, vocabulary: int = 10) -> Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# The module, inputs with a batch of 3, and the axes that vary.
NETS: dict[str, tuple[Callable[[], nn.Module], Tensor, tuple[int, ...]]] = {
    "convolutions": (ConvNet, image(3), (0,)),
    "mlp": (mlp, noise(3, 6), (0,)),
    "encoder": (Encoder, token_ids(), (0, 1)),
    "norms": (Norms, noise(3, 2, 16), (0,)),
    "tied": (Tied, token_ids(), (0,)),
    "lstm": (
        lambda: Recurrent(nn.LSTM, num_layers=2, dropout=0.2, bidirectional=True, proj_size=0),
        token_ids(),
        (0,),
    ),
    "gru": (lambda: Recurrent(nn.GRU), token_ids(), (0,)),
    "rnn": (lambda: Recurrent(nn.RNN, nonlinearity="relu"), token_ids(), (0,)),
}


def net(name: str) -> tuple[nn.Module, Tensor, tuple[int, ...]]:
    make, example, axes = NETS[name]
    torch.manual_seed(0)
    return make().eval(), example, axes


class Wrapped(nn.Module):
    """Gives its logits in the way that `form` says."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 3)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.head(x), x * 2)


def train(module: nn.Module, inputs: Tensor, classes: int) -> list[float]:
    """Losses of three steps, with the dropout of one seed."""
    targets = torch.arange(len(inputs)) % classes
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module.train()
    torch.manual_seed(1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = functional.cross_entropy(module(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    module.eval()
    return losses
