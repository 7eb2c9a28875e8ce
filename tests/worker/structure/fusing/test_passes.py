"""Fusing: networks of any code give what they gave; what could not stay the same stays as it is, with the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from app.contract.fusing import PASSES
from tests.worker.structure.nets import images, network
from worker.constraints import baked
from worker.data.batch import Inputs
from worker.structure.fusing.judging import Judge
from worker.structure.fusing.passes import Fusion, fuse, kinds, make


def fused(module: nn.Module, inputs: Inputs, other: Inputs) -> tuple[nn.Module, Fusion]:
    found = fuse(module, [inputs, other], [inputs, other], PASSES, lambda name: None, for_inference=False)
    made = baked(module)
    make(made, found.edits)
    return made, found


def norms(module: nn.Module) -> list[str]:
    return [name for name, own in module.named_modules() if isinstance(own, nn.modules.batchnorm._BatchNorm)]


def trained(module: nn.Module) -> nn.Module:
    """With statistics and factors of which each says something."""
    torch.manual_seed(0)
    for own in module.modules():
        if isinstance(own, nn.modules.batchnorm._BatchNorm) and own.running_mean is not None:
            own.running_mean.normal_()
            own.running_var.uniform_(0.5, 2.0)
            if own.affine:
                nn.init.normal_(own.weight)
                nn.init.normal_(own.bias)
    return module.eval()


@pytest.mark.parametrize("name", ["residual", "chain", "depthwise", "resnet", "efficientnet", "mobilenet_v2"])
def test_all_batch_norms_of_public_networks_go(name: str) -> None:
    module, own, other = network(name)
    before = len(norms(module))
    made, found = fused(module, own, other)
    assert found.done["batch_norm"] == before > 0
    assert not norms(made)
    assert found.difference <= max(1e-5, found.rounding)
    if name != "mobilenet_v2":  # whose random weights lose more than that to float32 by themselves
        for inputs in (own, other):
            wanted = module(*inputs)
            assert (made(*inputs) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert sum(one.numel() for one in made.parameters()) < sum(one.numel() for one in module.parameters())
    assert kinds(made, own).total() < kinds(module, own).total()


class Net(nn.Module):
    """A convolution, a batch norm, and whatever else `way` says of the two."""

    def __init__(self, way: Callable[[Net, Tensor], Tensor], **norm: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, **norm), nn.Linear(8, 5)
        self.next, self.up = nn.Conv2d(8, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 2)
        self.open, self.row = nn.Conv2d(8, 8, 3), nn.BatchNorm1d(8)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.way(self, x).mean((2, 3)))


def read_twice(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    return F.relu(net.norm(y)) + y


def read_in_a_view(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    return net.norm(y) + y.flatten(1).mean(1)[:, None, None, None]


def called_twice(net: Net, x: Tensor) -> Tensor:
    return net.norm(net.next(net.next(net.conv(x))))


def norm_called_twice(net: Net, x: Tensor) -> Tensor:
    return net.norm(net.next(net.norm(net.conv(x))))


def weight_read(net: Net, x: Tensor) -> Tensor:
    return net.norm(net.conv(x)) * net.conv.weight.abs().mean()


def changed_between(net: Net, x: Tensor) -> Tensor:
    return net.norm(net.conv(x).relu_())


def in_front_of_padding(net: Net, x: Tensor) -> Tensor:
    return net.next(net.norm(F.relu(net.conv(x))))


def in_front_of_transposed(net: Net, x: Tensor) -> Tensor:
    return net.up(net.norm(F.relu(net.conv(x))))


@pytest.mark.parametrize(
    ("way", "why"),
    [
        (read_twice, "gives is read elsewhere"),
        (read_in_a_view, "gives is read elsewhere"),
        (called_twice, "calls the layer 2 times"),
        (norm_called_twice, "calls it 2 times"),
        (weight_read, "weight is read elsewhere"),
        (changed_between, "gives is read elsewhere"),
        (in_front_of_padding, "pads with zeros"),
        (in_front_of_transposed, "is transposed"),
    ],
)
def test_what_has_other_readers_stays(way: Callable[[Net, Tensor], Tensor], why: str) -> None:
    module = trained(Net(way))
    own, other = images()
    made, found = fused(module, own, other)
    assert why in found.kept["norm"]
    assert "norm" in norms(made)
    assert torch.equal(made(*own), module(*own))


def test_statistics_of_the_batch_stay() -> None:
    module = trained(Net(lambda net, x: net.norm(net.conv(x)), track_running_stats=False))
    _, found = fused(module, *images())
    assert "what each batch has" in found.kept["norm"]


def test_a_norm_in_front_of_one_that_does_not_pad_goes() -> None:
    module = trained(Net(lambda net, x: net.open(net.norm(F.relu(net.conv(x))))))
    own, other = images()
    made, found = fused(module, own, other)
    assert found.folds == [{"layer": "open", "norm": "norm", "way": "before"}]
    assert torch.allclose(made(*own), module(*own), atol=1e-5)


def test_a_norm_of_another_dimension_than_the_layers_stays() -> None:
    """Of [batch, channels, length] a Linear layer makes lengths, and the norm is of channels."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(x))

    _, found = fused(trained(Rows()), (torch.randn(2, 8, 6),), (torch.randn(3, 8, 6),))
    assert "another dimension" in found.kept["norm"]


def test_norms_in_a_row_go_into_one_layer() -> None:
    module = trained(nn.Sequential(
        nn.BatchNorm1d(6), nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.BatchNorm1d(8, affine=False), nn.ReLU(),
        nn.Linear(8, 5),
    ))  # fmt: skip
    own, other = (torch.randn(2, 6),), (torch.randn(3, 6),)
    made, found = fused(module, own, other)
    assert [type(one).__name__ for one in made.children()] == ["Linear", "ReLU", "Linear"]
    assert found.done["batch_norm"] == 3
    assert torch.allclose(made(*own), module(*own), atol=1e-5)


def test_layers_that_no_output_needs_go() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.pooler, self.spare, self.head = (nn.Linear(6, 6) for _ in range(4))
            self.table = nn.Embedding(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            torch.tanh(self.pooler(y))
            z = torch.zeros_like(y)
            z[:, :] = y  # written in place
            return self.head(z)

    module = Pooled().eval()
    own, other = (torch.randn(2, 6),), (torch.randn(3, 6),)
    made, found = fused(module, own, other)
    assert {row["name"]: row["values"] for row in found.dead} == {"pooler": 42, "spare": 42, "table": 24}
    assert torch.equal(made(*own), module(*own))


def test_a_pass_that_changes_the_outputs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module, own, other = network("residual")
    monkeypatch.setattr(Judge, "most", 0.0)
    made, found = fused(module, own, other)
    assert "outputs differ" in found.refused["batch_norm"]
    assert not found.edits
    assert norms(made) == norms(module)


def test_a_wrong_fold_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    import worker.structure.fusing.edit as fusing

    right = fusing.behind
    monkeypatch.setattr(fusing, "behind", lambda *args, **own: (right(*args, **own)[0], right(*args, **own)[1] * 1.01))
    _, found = fused(*network("residual"))
    assert "outputs differ" in found.refused["batch_norm"]
