"""Running averages of a network's weights: exact, several at once, kept up to date while it trains.

The names below that need TensorFlow load it when first used, so that `import streaming_polyak` is quick and everything
that only touches numbers or files works without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from streaming_polyak.errors import NonFiniteError, StreamingPolyakError, SwapError
from streaming_polyak.schedule import Average, Members
from streaming_polyak.weighting import LINEAR, MEAN, Exponential, Polynomial, Weighting, parse_weighting

if TYPE_CHECKING:
    from streaming_polyak.training.history import History
    from streaming_polyak.training.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "LINEAR",
    "MEAN",
    "Average",
    "Exponential",
    "History",
    "Members",
    "NonFiniteError",
    "Polynomial",
    "StreamingPolyakError",
    "SwapError",
    "Trainer",
    "Weighting",
    "parse_weighting",
]

_LAZY = {"History": "streaming_polyak.training.history", "Trainer": "streaming_polyak.training.trainer"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
