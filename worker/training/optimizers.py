"""The optimizers by the names of the specification."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from app.contract.errors import Unsupported
from app.contract.training import Settled
from worker.training.groups import groups


def build(
    module: nn.Module,
    training: Settled,
    beside: Iterable[nn.Parameter] = (),
    undecayed: Iterable[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """An optimizer over every trainable parameter of the module, in the groups of `worker.training.groups`.

    What a loss learns `beside` it is a group of its own, at the whole rate; of it what is `undecayed` is another.

    `weight_decay` is added to the gradient (L2) by all but adamw and adafactor, which take it off the weight itself
    (Loshchilov & Hutter 2017; Shazeer & Stern 2018). `momentum` is that of sgd (classical, or Nesterov's) and rmsprop;
    what the specification does not name keeps torch's default. Raises Unsupported where there is nothing to train.
    """
    parameters = groups(module, training)
    if not parameters:
        raise Unsupported("The model has no trainable weights, so there is nothing to train. Leave the training out.")
    plain = list(undecayed)
    apart = {id(own) for own in plain}
    for own, decay in (([one for one in beside if id(one) not in apart], training.weight_decay), (plain, 0.0)):
        if own:
            parameters.append({"params": own, "weight_decay": decay, "scale": 1.0})
    lr, momentum, betas = training.lr, training.momentum, training.betas
    match training.optimizer:
        case "sgd":
            return torch.optim.SGD(parameters, lr=lr, momentum=momentum, nesterov=training.nesterov)
        case "adam":
            return torch.optim.Adam(parameters, lr=lr, betas=betas)
        case "adamw":
            return torch.optim.AdamW(parameters, lr=lr, betas=betas)
        case "rmsprop":
            return torch.optim.RMSprop(parameters, lr=lr, momentum=momentum)
        case "adagrad":
            return torch.optim.Adagrad(parameters, lr=lr)
        case "adadelta":
            return torch.optim.Adadelta(parameters, lr=lr)
        case "nadam":
            return torch.optim.NAdam(parameters, lr=lr, betas=betas)
        case "radam":
            return torch.optim.RAdam(parameters, lr=lr, betas=betas)
        case "adafactor":
            return torch.optim.Adafactor(parameters, lr=lr)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step, scaled for each group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
