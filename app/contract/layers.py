"""The layers an architecture may name: those of `torch.nn` that hold no code, with torch's own arguments and defaults.

One row a layer. `create_model` turns each row into a strict class: a misspelt argument is an error at its place.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, ConfigDict, Field, create_model

from app.contract.strict import Strict

MAX_SIZE = 65_536  # of one dimension: wider layers are not built from JSON, and products stay within 64 bits
MAX_VOCABULARY = 1 << 24  # rows of an embedding
MAX_RECURRENT_LAYERS = 64  # one LSTM entry stands for this many layers at most

Size = Annotated[int, Field(strict=True, ge=1, le=MAX_SIZE)]
Count = Annotated[int, Field(strict=True, ge=0, le=MAX_SIZE)]
Axis = Annotated[int, Field(strict=True, ge=-8, le=8)]
Real = Annotated[float, Field(strict=True, ge=-1e6, le=1e6)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Epsilon = Annotated[float, Field(strict=True, gt=0, le=1)]
_NORM = Annotated[float, Field(strict=True, ge=1, le=64)]
_SCALE = Annotated[float, Field(strict=True, gt=0, le=1024)]
Flag = Annotated[bool, Field(strict=True)]
Arguments: TypeAlias = dict[str, Any]


class Layer(Strict):
    """One entry of an architecture; `type` names a torch.nn class or one of Sequential, Residual, Parallel."""

    # A default of 1 for a stride becomes (1, 1), as a given 1 does.
    model_config = ConfigDict(validate_default=True)

    type: str


def _each(dimensions: int, item: Any) -> Any:
    """One value an axis; a single value stands for all of them, as in torch.nn."""
    wanted: Any = tuple[(item,) * dimensions]  # type: ignore[misc]  # as long as there are dimensions
    spread = BeforeValidator(
        lambda value: value if isinstance(value, list | tuple) else (value,) * dimensions,
        json_schema_input_type=item | wanted,
    )
    return Annotated[wanted, spread]


def _window(dimensions: int) -> Arguments:
    return {"kernel_size": (_each(dimensions, Size), ...), "stride": (_each(dimensions, Size) | None, None)}


def _conv(dimensions: int) -> Arguments:
    return {
        "in_channels": (Size, ...),
        "out_channels": (Size, ...),
        "kernel_size": (_each(dimensions, Size), ...),
        "stride": (_each(dimensions, Size), 1),
        "padding": (Literal["same", "valid"] | _each(dimensions, Count), 0),
        "dilation": (_each(dimensions, Size), 1),
        "groups": (Size, 1),
        "bias": (Flag, True),
        "padding_mode": (Literal["zeros", "reflect", "replicate", "circular"], "zeros"),
    }


def _conv_transpose(dimensions: int) -> Arguments:
    return _conv(dimensions) | {
        "padding": (_each(dimensions, Count), 0),
        "output_padding": (_each(dimensions, Count), 0),
        "padding_mode": (Literal["zeros"], "zeros"),
    }


def _norm(affine: bool, track_running_stats: tuple[Any, bool]) -> Arguments:
    return {
        "num_features": (Size, ...),
        "eps": (Epsilon, 1e-5),
        "momentum": (Share | None, 0.1),
        "affine": (Flag, affine),
        "track_running_stats": track_running_stats,
    }


def _max_pool(dimensions: int) -> Arguments:
    return _window(dimensions) | {
        "padding": (_each(dimensions, Count), 0),
        "dilation": (_each(dimensions, Size), 1),
        "ceil_mode": (Flag, False),
    }


def _avg_pool(dimensions: int) -> Arguments:
    divisor: Arguments = {"divisor_override": (Size | None, None)} if dimensions > 1 else {}
    return (
        _window(dimensions)
        | {
            "padding": (_each(dimensions, Count), 0),
            "ceil_mode": (Flag, False),
            "count_include_pad": (Flag, True),
        }
        | divisor
    )


def _lp_pool(dimensions: int) -> Arguments:
    # Along one axis torch computes with the size as a number.
    window = _window(dimensions) if dimensions > 1 else {"kernel_size": (Size, ...), "stride": (Size | None, None)}
    return {"norm_type": (_NORM, ...)} | window | {"ceil_mode": (Flag, False)}


def _adaptive(dimensions: int) -> Arguments:
    return {"output_size": (_each(dimensions, Size if dimensions == 1 else Size | None), ...)}


def _pad(dimensions: int, **extra: Any) -> Arguments:
    """Both ends of each axis, the last axis first, as in torch.nn."""
    return {"padding": (_each(2 * dimensions, Count), ...)} | extra


def _recurrent() -> Arguments:
    return {
        "input_size": (Size, ...),
        "hidden_size": (Size, ...),
        "num_layers": (Annotated[int, Field(strict=True, ge=1, le=MAX_RECURRENT_LAYERS)], 1),
        "bias": (Flag, True),
        "batch_first": (Literal[True], True),
        "dropout": (Share, 0.0),
        "bidirectional": (Flag, False),
        "output": (
            Annotated[
                Literal["last", "sequence"],
                Field(description="last: the final hidden state [batch, features]; sequence: every step's."),
            ],
            "sequence",
        ),
    }


_TRACKED = (
    Annotated[
        Literal[True], Field(description="Without them what a sample gives would depend on the others of its batch.")
    ],
    True,
)
_INPLACE: Arguments = {"inplace": (Flag, False)}
_DROPOUT: Arguments = {"p": (Share, 0.5)} | _INPLACE
_SHAPE = Annotated[
    tuple[Size, ...],
    Field(min_length=1, max_length=8),
    BeforeValidator(
        lambda value: value if isinstance(value, list | tuple) else (value,),
        json_schema_input_type=Size | tuple[Size, ...],
    ),
]

TABLE: dict[str, Arguments] = {
    "Linear": {"in_features": (Size, ...), "out_features": (Size, ...), "bias": (Flag, True)},
    **{f"Conv{n}d": _conv(n) for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": _conv_transpose(n) for n in (1, 2, 3)},
    **{f"BatchNorm{n}d": _norm(affine=True, track_running_stats=_TRACKED) for n in (1, 2, 3)},
    **{f"InstanceNorm{n}d": _norm(affine=False, track_running_stats=(Flag, False)) for n in (1, 2, 3)},
    "LayerNorm": {
        "normalized_shape": (_SHAPE, ...),
        "eps": (Epsilon, 1e-5),
        "elementwise_affine": (Flag, True),
        "bias": (Flag, True),
    },
    "GroupNorm": {
        "num_groups": (Size, ...),
        "num_channels": (Size, ...),
        "eps": (Epsilon, 1e-5),
        "affine": (Flag, True),
    },
    "RMSNorm": {"normalized_shape": (_SHAPE, ...), "eps": (Epsilon | None, None), "elementwise_affine": (Flag, True)},
    "LocalResponseNorm": {"size": (Size, ...), "alpha": (Real, 1e-4), "beta": (Real, 0.75), "k": (Real, 1.0)},
    **{f"MaxPool{n}d": _max_pool(n) for n in (1, 2, 3)},
    **{f"AvgPool{n}d": _avg_pool(n) for n in (1, 2, 3)},
    **{f"LPPool{n}d": _lp_pool(n) for n in (1, 2, 3)},
    **{f"AdaptiveAvgPool{n}d": _adaptive(n) for n in (1, 2, 3)},
    **{f"AdaptiveMaxPool{n}d": _adaptive(n) for n in (1, 2, 3)},
    **dict.fromkeys(("ReLU", "ReLU6", "SELU", "SiLU", "Mish", "Hardswish", "Hardsigmoid"), _INPLACE),
    **{name: {} for name in ("Sigmoid", "Tanh", "LogSigmoid", "Softsign", "Identity")},
    "LeakyReLU": {"negative_slope": (Real, 0.01)} | _INPLACE,
    "ELU": {"alpha": (Real, 1.0)} | _INPLACE,
    "CELU": {"alpha": (Real, 1.0)} | _INPLACE,
    "GELU": {"approximate": (Literal["none", "tanh"], "none")},
    "GLU": {"dim": (Axis, -1)},
    "Hardtanh": {"min_val": (Real, -1.0), "max_val": (Real, 1.0)} | _INPLACE,
    "Softplus": {"beta": (Real, 1.0), "threshold": (Real, 20.0)},
    "PReLU": {"num_parameters": (Size, 1), "init": (Real, 0.25)},
    "Softmax": {"dim": (Axis | None, None)},
    "LogSoftmax": {"dim": (Axis | None, None)},
    **dict.fromkeys(("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout"), _DROPOUT),
    "Flatten": {"start_dim": (Axis, 1), "end_dim": (Axis, -1)},
    "Unflatten": {"dim": (Axis, ...), "unflattened_size": (_SHAPE, ...)},
    **{f"{kind}Pad{n}d": _pad(n) for kind in ("Zero", "Reflection", "Replication", "Circular") for n in (1, 2, 3)},
    **{f"ConstantPad{n}d": _pad(n, value=(Real, ...)) for n in (1, 2, 3)},
    "Upsample": {
        "size": (Size | _SHAPE | None, None),
        "scale_factor": (_SCALE | None, None),
        "mode": (Literal["nearest", "linear", "bilinear", "bicubic", "trilinear"], "nearest"),
        "align_corners": (Flag | None, None),
    },
    "PixelShuffle": {"upscale_factor": (Size, ...)},
    "PixelUnshuffle": {"downscale_factor": (Size, ...)},
    "Embedding": {
        "num_embeddings": (Annotated[int, Field(strict=True, ge=1, le=MAX_VOCABULARY)], ...),
        "embedding_dim": (Size, ...),
        "padding_idx": (Annotated[int, Field(strict=True, ge=-MAX_VOCABULARY, lt=MAX_VOCABULARY)] | None, None),
    },
    "LSTM": _recurrent() | {"proj_size": (Count, 0)},
    "GRU": _recurrent(),
    "TransformerEncoderLayer": {
        "d_model": (Size, ...),
        "nhead": (Size, ...),
        "dim_feedforward": (Size, 2048),
        "dropout": (Share, 0.1),
        "activation": (Literal["relu", "gelu"], "relu"),
        "layer_norm_eps": (Epsilon, 1e-5),
        "batch_first": (Literal[True], True),
        "norm_first": (Flag, False),
        "bias": (Flag, True),
    },
}


def _layer_class(name: str, arguments: Arguments) -> type[Layer]:
    # A Literal of a variable is what makes the discriminator; type checkers only know literal literals.
    tag: Any = Literal[name]
    return create_model(
        name, __base__=Layer, __module__=__name__, __doc__=f"As torch.nn.{name}.", type=(tag, ...), **arguments
    )


LAYERS: tuple[type[Layer], ...] = tuple(_layer_class(name, arguments) for name, arguments in TABLE.items())
