"""Values of the command line: what the text of an argument means.

In: text. Out: a value, or typer's error. What a value is good for is checked where it is used; here only its form is.
"""

from __future__ import annotations

import contextlib

import typer


def read_ratios(text: str) -> int | dict[int, int]:
    """A reduction ratio, or one for each stage.

    Examples:
        >>> read_ratios("16"), read_ratios("3=8,4=16")
        (16, {3: 8, 4: 16})
    """
    try:
        if "=" not in text:
            return int(text)
        pairs = [part.split("=") for part in text.split(",")]
        ratios = {int(stage): int(ratio) for stage, ratio in pairs}
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is neither a number nor STAGE=NUMBER,... such as 3=8,4=16.") from error
    if len(ratios) < len(pairs):
        raise typer.BadParameter(f"{text!r} names a stage twice.")
    return ratios


def read_numbers(text: str) -> tuple[int, ...]:
    """Whole numbers, separated by commas.

    Examples:
        >>> read_numbers("3,-1")
        (3, -1)
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers such as 3,4.") from error


def read_size(text: str) -> tuple[int, ...]:
    """The size of an image, (C, H, W), or the side of a square one in colour.

    Examples:
        >>> read_size("1,28,28"), read_size("64")
        ((1, 28, 28), (3, 64, 64))
    """
    size = read_numbers(text)
    size = (3, *size, *size) if len(size) == 1 else size
    if len(size) not in (3, 4) or min(size) < 1:
        raise typer.BadParameter(f"{text!r} is not a size C,H,W such as 3,224,224, nor a side such as 224.")
    return size


def read_budget(text: str) -> float:
    """Parameters to keep, or a share of them.

    Examples:
        >>> read_budget("100000"), read_budget("0.5")
        (100000, 0.5)
    """
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    raise typer.BadParameter(f"{text!r} is neither a number of parameters nor a share such as 0.5.")
