"""The errors that callers may want to catch by kind; wrong arguments are plain ValueError and TypeError."""


class StreamingPolyakError(Exception):
    """The root of the library's own errors."""


class NonFiniteError(StreamingPolyakError, ArithmeticError):
    """A weight is NaN or infinite, so it was kept out of every average; the averages are as they were."""


class SwapError(StreamingPolyakError, RuntimeError):
    """An average stands in the model, and what was asked for needs the raw weights in it."""


class RunLockedError(StreamingPolyakError, RuntimeError):
    """Another process is training in the same run folder."""


class Interrupted(SystemExit):
    """SIGTERM or Ctrl-C came while a run was training; it has been saved, and the same call goes on with it.

    A `SystemExit`, so that a script that does not catch it ends with the usual status, 128 + the signal's number.
    """

    def __init__(self, number: int, folder: object) -> None:
        super().__init__(128 + number)
        self.number, self.folder = number, folder


class CheckpointError(StreamingPolyakError, ValueError):
    """A checkpoint file is refused: damaged, hostile, of an unknown format, or not of the same model as the others.

    Attributes:
        code: a stable word for the kind of reason, such as "soft-link" or "truncated".
        path: the file.
        tensor: the name of the tensor, if one is to blame.
    """

    def __init__(self, code: str, path: object, reason: str, *, tensor: str | None = None) -> None:
        where = f"{path}" if tensor is None else f"{path}, tensor {tensor!r}"
        super().__init__(f"{where}: {reason}")
        self.code, self.path, self.tensor, self.reason = code, str(path), tensor, reason

    def __reduce__(self) -> tuple[object, ...]:
        return _checkpoint_error, (self.code, self.path, self.reason, self.tensor)


def _checkpoint_error(code: str, path: str, reason: str, tensor: str | None) -> CheckpointError:
    return CheckpointError(code, path, reason, tensor=tensor)
