"""Save a network with SEs, load it as a timm model, and see what is refused.

    python examples/save_load.py resnet18

Runs offline on a CPU in seconds.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import se_surgery


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default="resnet18", help="a timm model (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_and_load(args.base, Path(folder))


def save_and_load(base: str, folder: Path) -> None:
    """Save a model whose SEs have learnt something, and load it three times."""
    model = se_surgery.add_se(timm.create_model(base), r={3: 16, 4: 8}).eval()
    sites = se_surgery.find_se(model)
    for site in sites:
        nn.init.normal_(model.get_submodule(site.path).fc2.weight)

    # push_to_hub(model, "user/name") puts the same files into a repository.
    se_surgery.save_pretrained(model, folder, example_input=(3, 64, 64))
    print(f"{base} with {len(sites)} SEs: {', '.join(sorted(path.name for path in folder.iterdir()))}")

    images = torch.randn(2, 3, 64, 64)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        print(f"Loaded, its outputs are bit-equal: {torch.equal(loaded(images), model(images))}")

    other = se_surgery.from_pretrained(folder, num_classes=10, in_chans=1)
    gates = [(other.get_submodule(site.path), model.get_submodule(site.path)) for site in sites]
    kept = sum(torch.equal(ours.fc2.weight, saved.fc2.weight) for ours, saved in gates)
    print(f"With 10 classes and 1 channel {kept} of {len(gates)} SEs are those that were saved")

    weights = str(folder / "model.safetensors")
    tensors = load_file(weights)
    lost = f"{sites[0].path}.fc2.weight"
    save_file({key: value for key, value in tensors.items() if key != lost}, weights)
    try:
        timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=10)
    except se_surgery.ArtefactError as error:
        print(f"Without one tensor it is refused: {str(error).removeprefix(weights).strip()}")


if __name__ == "__main__":
    main()
