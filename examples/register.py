"""Give a network with SEs a name in timm, and build it where that name is unknown.

    python examples/register.py resnet18 --placement pre --r 8

Runs offline on a CPU in seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import timm

import se_surgery

NAME = "my_se_model"
# What another process does, with the arguments on its standard input: the plugin has to be imported and nothing else.
ELSEWHERE = f"""
import json, sys, timm, se_surgery
model = timm.create_model(**json.load(sys.stdin))
shapes = {{key: list(value.shape) for key, value in model.state_dict().items()}}
print(json.dumps([timm.is_model({NAME!r}), se_surgery.recipe_of(model), shapes]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default="resnet18", help="a timm model (default: %(default)s)")
    parser.add_argument("--placement", default="pre", help="where the SEs go (default: %(default)s)")
    parser.add_argument("--r", type=int, default=8, help="reduction ratio (default: %(default)s)")
    args = parser.parse_args()

    se_surgery.register_se(NAME, args.base, placement=args.placement, r=args.r)
    print(f"timm lists {timm.list_models('my_*')}, with the weights of {args.base}: {timm.list_pretrained('my_*')}")

    model = timm.create_model(NAME, num_classes=10, in_chans=1)
    sites = se_surgery.find_se(model)
    print(f"{NAME} with 10 classes and 1 channel: {sum(p.numel() for p in model.parameters()):,} parameters")
    print(f"{len(sites)} SEs, of {', '.join(str(site.rd_channels) for site in sites)} hidden channels")

    # The model calls itself by the generic name, which everybody has who imports se_surgery. Its recipe is plain data
    # and names the base: with timm's own arguments it is all that another process needs.
    architecture, recipe = model.pretrained_cfg["architecture"], se_surgery.recipe_of(model)
    print(f"Its architecture is {architecture!r}, its recipe {len(json.dumps(recipe)):,} bytes")
    arguments = {"model_name": architecture, "recipe": recipe, "num_classes": 10, "in_chans": 1}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], input=json.dumps(arguments), capture_output=True, text=True, check=True
    )
    known, operated, shapes = json.loads(done.stdout)
    same = shapes == {key: list(value.shape) for key, value in model.state_dict().items()}
    print(f"Another process knows {NAME}: {known}; it builds the same model: {same and operated == recipe}")

    se_surgery.unregister_se(NAME)
    print(f"Unregistered, timm lists {timm.list_models('my_*')}")


if __name__ == "__main__":
    main()
