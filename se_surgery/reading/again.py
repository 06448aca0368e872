"""Again: whether an error is the answer of what was tried, or came from elsewhere.

In: work that failed. Out: whether it fails each time. Where code of others is tried, what it raises says that it does
not take this input; memory that was short for a moment, or an error of this library's own, says nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def comes_again(error: Exception, work: Callable[[], Any]) -> bool:
    """Whether work that raised an error raises one again; short memory is no answer, however often it is short.

    Examples:
        >>> comes_again(ValueError(), lambda: int("x")), comes_again(ValueError(), lambda: int("1"))
        (True, False)
    """
    if isinstance(error, MemoryError):
        return False
    try:
        work()
    except Exception:  # whatever it is, it is the answer
        return True
    return False
