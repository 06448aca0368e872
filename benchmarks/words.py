"""Write se_surgery/words.json: what the shell's Tab key offers, from the command line and docs/coverage.jsonl.

python -m benchmarks.words
"""

from __future__ import annotations

import json
from typing import Any

import typer

from se_surgery.commands.complete import MODELS, WORDS
from se_surgery.commands.main import app
from se_surgery.planning.options import EXISTING
from se_surgery.planning.placements import PLACEMENTS
from se_surgery.se.excite import GATES, INITS, LIGHT_ATTENTION, SQUEEZES
from se_surgery.surgery.strip import ORIGINS

from .coverage.rows import ROWS, read

_VALUES: dict[str, Any] = {
    "model": MODELS,
    "placement": PLACEMENTS,
    "existing": EXISTING,
    "init": INITS,
    "squeeze": SQUEEZES,
    "gate": GATES,
    "attn": ("se", *LIGHT_ATTENTION),
    "origin": ORIGINS,
}


def words() -> dict[str, Any]:
    """What the file says."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {
        "commands": {name: _command(command) for name, command in commands.items()},
        MODELS: sorted({row["name"] for row in read(ROWS).values() if row.get("units")}),
    }


def _command(command: Any) -> dict[str, Any]:
    return {
        "help": command.help.partition("\n")[0],
        "parameters": [_parameter(parameter) for parameter in command.params if parameter.name != "help"],
    }


def _parameter(parameter: Any) -> dict[str, Any]:
    names = list(parameter.opts) if parameter.param_type_name == "option" else []
    flag = bool(names and parameter.is_flag)
    if flag and parameter.secondary_opts:
        names = [f"{names[0]}/{parameter.secondary_opts[0]}"]
    values = _VALUES.get(parameter.name, [])
    return {
        "names": names,
        "help": (parameter.help or "").partition(". ")[0],
        "flag": flag,
        "values": values if isinstance(values, str) else list(values),
    }


def main() -> None:
    """Write the file."""
    found = words()
    WORDS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{len(found['commands'])} commands, {len(found[MODELS])} models: {WORDS.name}")


if __name__ == "__main__":
    main()
