"""Stem: the weights of a first convolution for another number of input channels.

In: a weight, and for how many channels it was made. Out: one for as many as are asked for. The rule is timm's; its own
function knows weights for other images than RGB since 1.0.31 only, and drops them before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor


def fit_stems(
    tensors: Mapping[str, Tensor], stems: str | Iterable[str] | None, saved: int, wanted: int
) -> dict[str, Tensor]:
    """Convert the first convolutions of a state dict.

    Args:
        tensors: The state dict.
        stems: Paths of the first convolutions, as timm's configurations have them.
        saved: Number of channels of the images that they were made for.
        wanted: Number of channels that they shall take.

    Returns:
        The state dict with the others' weights as they are.

    Examples:
        >>> gray = fit_stems({"conv1.weight": torch.ones(64, 3, 7, 7)}, "conv1", saved=3, wanted=1)["conv1.weight"]
        >>> gray.shape, gray[0, 0, 0, 0]
        (torch.Size([64, 1, 7, 7]), tensor(3.))
    """
    if saved == wanted or stems is None:
        return dict(tensors)
    names = {f"{stem}.weight" for stem in ([stems] if isinstance(stems, str) else stems)}
    return {key: _fit(value, saved, wanted) if key in names else value for key, value in tensors.items()}


def _fit(weight: Tensor, saved: int, wanted: int) -> Tensor:
    """One channel is the sum of all; several are the old ones in turn, scaled so that the sum is about the same."""
    outputs, inputs, *kernel = weight.shape
    values = weight.float()  # a sum in half precision would be rounded at each step
    if wanted == 1:
        # Of a stem that moves space into channels, each position keeps its own.
        fitted = values.reshape(outputs, inputs // saved, saved, *kernel).sum(dim=2)
    else:
        fitted = values.repeat(1, -(-wanted // saved), 1, 1)[:, :wanted] * (saved / wanted)
    return fitted.to(weight.dtype)
