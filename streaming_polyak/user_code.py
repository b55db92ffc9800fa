"""Functions that the user names on the command line, and how errors in them, and in the rest, are shown."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import click

from streaming_polyak.errors import StreamingPolyakError
from streaming_polyak.files.tensors import printable


def safe(text: str) -> str:
    """Returns lines in which nothing that stands in a stranger's file, such as a name, controls the terminal."""
    return "\n".join(map(printable, text.split("\n")))


class Error(click.ClickException):
    """The work could not be done."""

    def format_message(self) -> str:
        return safe(self.message)


class UserError(Error):
    """An error of a function that the user gave; `frames` are shown before its message."""

    def __init__(self, message: str, frames: str) -> None:
        super().__init__(message)
        self.frames = frames

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(safe(self.frames), file, nl=False, err=True)
        super().show(file)


def load(function: str, hint: str) -> Callable[[Any], Any]:
    """Returns the callable that MODULE:NAME or PATH.py:NAME stands for; what it raises is told as the user's error.

    `hint` says where the name was given, for messages.
    """
    module, colon, name = function.rpartition(":")
    if not (module and colon and name):
        raise click.BadParameter(f"{function!r} is not of the form MODULE:FUNCTION", param_hint=hint)
    try:
        # Their folder goes behind all others in sys.path, so that no file in it hides a module that is imported later.
        with told(function):
            if module.endswith(".py"):
                loaded = _from_path(Path(module).resolve(), hint)
            else:
                sys.path.append(os.getcwd())
                loaded = importlib.import_module(module)
    except UserError as error:
        missing = error.__cause__.name if isinstance(error.__cause__, ModuleNotFoundError) else None
        if missing is not None and f"{module}.".startswith(f"{missing}."):
            raise click.BadParameter(f"{function!r} cannot be loaded: {error.__cause__}", param_hint=hint) from error
        raise
    found = getattr(loaded, name, None)
    if not callable(found):
        reason = "is not callable" if hasattr(loaded, name) else f"cannot be loaded: {loaded.__file__} has no such name"
        raise click.BadParameter(f"{function!r} {reason}", param_hint=hint)

    def call(argument: Any) -> Any:
        with told(function):
            return found(argument)

    return call


def _from_path(path: Path, hint: str) -> ModuleType:
    if not path.is_file():
        raise click.BadParameter(f"{path} cannot be loaded: there is no such file", param_hint=hint)
    sys.path.append(str(path.parent))
    name = path.stem if path.stem not in sys.modules else f"{path.stem} of {hint}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look for it
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def told(function: str) -> Iterator[None]:
    """Tells an error of the user's own code by the frames that led to it there, and where in their file it arose."""
    try:
        yield
    except (StreamingPolyakError, click.ClickException):
        raise
    except Exception as error:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename not in (__file__, importlib.__file__) and "importlib._boot" not in frame.filename
        ]
        where = ""
        if frames and Path(frames[0].filename).is_relative_to(Path(__file__).parent):
            frames = []  # an object of the library, such as a KerasEvaluator: its message says all
        if frames:
            line = [frame.lineno for frame in frames if frame.filename == frames[0].filename][-1]
            where = f" ({frames[0].filename}:{line})"
        shown = "".join(traceback.format_list(frames))
        raise UserError(f"{function} raised {type(error).__name__}: {error}{where}", shown) from error
