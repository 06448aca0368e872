"""Readme: the sections of README.md that commands write, each between two markers.

In: a text and a section. Out: the text with that section made anew.
"""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def with_section(text: str, name: str, command: str, section: str) -> str:
    """A README with one of its sections made anew.

    Args:
        text: The README.
        name: The section's name, for its markers.
        command: The command that makes it.
        section: What is to be in it.

    Raises:
        ValueError: The text does not have the two markers.
    """
    begin, end = f"<!-- {name}: begin, made by {command} -->", f"<!-- {name}: end -->"
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"The README has no section to write to. Put {begin} and {end} where it is to be.")
    return f"{before}{begin}\n{section}{end}{after}"
