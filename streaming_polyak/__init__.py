"""Averages of a network's weights: exact, several at once, kept up to date while it trains or made of saved files.

What the names below need is loaded when they are first used, so that `import streaming_polyak` is quick, and everything
that only touches numbers or files works without TensorFlow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from streaming_polyak.errors import (
    CheckpointError,
    Interrupted,
    NonFiniteError,
    RunLockedError,
    StreamingPolyakError,
    SwapError,
)
from streaming_polyak.schedule import Average, Members
from streaming_polyak.weighting import LINEAR, MEAN, Exponential, Polynomial, Weighting, parse_weighting

if TYPE_CHECKING:
    from streaming_polyak.files.average import AverageReport, average_checkpoints
    from streaming_polyak.files.inspection import Inspection, inspect_checkpoints
    from streaming_polyak.files.sweep import sweep_checkpoints
    from streaming_polyak.files.sweep_result import SweepResult, SweepRow
    from streaming_polyak.files.verify import Verified, verify_checkpoint
    from streaming_polyak.training.evaluation import KerasEvaluator
    from streaming_polyak.training.history import History
    from streaming_polyak.training.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "LINEAR",
    "MEAN",
    "Average",
    "AverageReport",
    "CheckpointError",
    "Exponential",
    "History",
    "Inspection",
    "Interrupted",
    "KerasEvaluator",
    "Members",
    "NonFiniteError",
    "Polynomial",
    "RunLockedError",
    "StreamingPolyakError",
    "SwapError",
    "SweepResult",
    "SweepRow",
    "Trainer",
    "Verified",
    "Weighting",
    "average_checkpoints",
    "inspect_checkpoints",
    "parse_weighting",
    "sweep_checkpoints",
    "verify_checkpoint",
]

_LAZY = {
    name: module
    for module, names in {
        "streaming_polyak.files.average": ("AverageReport", "average_checkpoints"),
        "streaming_polyak.files.inspection": ("Inspection", "inspect_checkpoints"),
        "streaming_polyak.files.sweep": ("sweep_checkpoints",),
        "streaming_polyak.files.sweep_result": ("SweepResult", "SweepRow"),
        "streaming_polyak.files.verify": ("Verified", "verify_checkpoint"),
        "streaming_polyak.training.evaluation": ("KerasEvaluator",),
        "streaming_polyak.training.history": ("History",),
        "streaming_polyak.training.trainer": ("Trainer",),
    }.items()
    for name in names
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
