"""The optimizers by the names of the specification."""

from __future__ import annotations

import torch
from torch import nn

from app.contract.errors import Unsupported
from app.contract.training import Training


def build(module: nn.Module, training: Training) -> torch.optim.Optimizer:
    """An optimizer over every trainable parameter of the module.

    `weight_decay` applies to all of them, biases and norms included, as it does in torch: added to the gradient (L2) by
    sgd, adam and rmsprop, decoupled from it by adamw (Loshchilov & Hutter 2017). `momentum` is that of sgd (classical,
    not Nesterov's) and rmsprop; what the specification does not name keeps torch's default. Raises Unsupported where
    there is nothing to train.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise Unsupported("The model has no trainable weights, so there is nothing to train. Leave the training out.")
    lr, decay = training.lr, training.weight_decay
    match training.optimizer:
        case "sgd":
            return torch.optim.SGD(parameters, lr=lr, momentum=training.momentum, weight_decay=decay)
        case "adam":
            return torch.optim.Adam(parameters, lr=lr, weight_decay=decay)
        case "adamw":
            return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
        case "rmsprop":
            return torch.optim.RMSprop(parameters, lr=lr, momentum=training.momentum, weight_decay=decay)
