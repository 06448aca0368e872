"""Modes: torch's modes that are on while something runs, off again behind it.

In: a function that switches some on. Out: the same one, that leaves none on whatever it raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.overrides import _pop_mode as _pop_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._python_dispatch import _pop_mode as _pop_dispatch_mode

P = ParamSpec("P")
T = TypeVar("T")


def modes_off(function: Callable[P, T]) -> Callable[P, T]:
    """The function, with torch's modes as they were before it whatever it raises: whether gradients are on, and others.

    A `with` does not see to that by itself: Python may raise an interrupt when the block is over and its end has not
    begun. A mode that stays on answers for every later function of torch's in this thread.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        gradients = torch.is_grad_enabled()
        functions, dispatches = len(_get_current_function_mode_stack()), len(_get_current_dispatch_mode_stack())
        try:
            return function(*args, **kwargs)
        except BaseException:
            while len(_get_current_function_mode_stack()) > functions:
                _pop_function_mode()
            while len(_get_current_dispatch_mode_stack()) > dispatches:
                _pop_dispatch_mode()
            torch.set_grad_enabled(gradients)
            raise

    return run
