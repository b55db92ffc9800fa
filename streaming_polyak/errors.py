"""The errors that callers may want to catch by kind; wrong arguments are plain ValueError and TypeError."""


class StreamingPolyakError(Exception):
    """The root of the library's own errors."""


class NonFiniteError(StreamingPolyakError, ArithmeticError):
    """A weight is NaN or infinite, so it was kept out of every average; the averages are as they were."""


class SwapError(StreamingPolyakError, RuntimeError):
    """An average stands in the model, and what was asked for needs the raw weights in it."""
