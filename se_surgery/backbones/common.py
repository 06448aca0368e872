"""Backbone: what every network of this folder has, as timm expects it: a stem, stages, a head, and the ways into them.

In: a network's stem and stages. Out: `Backbone`, its builder for timm, and timm's configuration for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..errors import OptionError


class Backbone(nn.Module):
    """A network of a stem, stages and a classifier.

    Args:
        stem: What comes before the stages.
        stages: The stages.
        levels: Path, channels and reduction of the module that ends each level: first those in the stem, then every
            stage.
        num_classes: Number of classes; 0 for no classifier.
        in_chans: Channels of the images.
        global_pool: timm's name for the pooling of the last maps.
        drop_rate: Probability of dropout before the classifier.

    Shape:
        (B, in_chans, H, W) to (B, num_classes).
    """

    def __init__(
        self,
        stem: Sequence[nn.Module],
        stages: Sequence[nn.Module],
        levels: Sequence[tuple[str, int, int]],
        num_classes: int,
        in_chans: int,
        global_pool: str,
        drop_rate: float,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.stem = nn.Sequential(*stem)
        self.stages = nn.Sequential(*stages)
        self.feature_info: list[dict[str, Any]] = [
            {"module": path, "num_chs": channels, "reduction": reduction} for path, channels, reduction in levels
        ]
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = levels[-1][1]
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.grad_checkpointing = False
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's maps."""
        x = self.stem(x)
        maps: Tensor = checkpoint_seq(self.stages, x) if self.grad_checkpointing and self.training else self.stages(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Class scores of the last stage's maps; with `pre_logits` what the classifier would be given."""
        scores: Tensor = self.head(x, pre_logits=pre_logits)
        return scores

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps of the levels that `indices` chooses, and the last ones, with timm's arguments."""
        if output_fmt != "NCHW":
            raise OptionError(f"output_fmt={output_fmt!r} is no form that this network has. Take 'NCHW'.")
        taken, last = feature_take_indices(len(self.feature_info), indices)
        chosen = {self.feature_info[index]["module"] for index in taken}
        intermediates = []
        for path, module in self._steps(last if stop_early else None):
            x = module(x)
            if path in chosen:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def _steps(self, last: int | None) -> list[tuple[str, nn.Module]]:
        """The modules that are run one after the other, up to the end of one level."""
        steps = [
            (f"{name}.{i}", module)
            for name, part in (("stem", self.stem), ("stages", self.stages))
            for i, module in enumerate(part)
        ]
        end = None if last is None else self.feature_info[last]["module"]
        return steps if end is None else steps[: [path for path, _ in steps].index(end) + 1]

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Leave out what the levels that `indices` chooses do not need, with timm's arguments."""
        taken, last = feature_take_indices(len(self.feature_info), indices)
        kept = self._steps(last)
        self.stem = self.stem[: sum(path.startswith("stem.") for path, _ in kept)]
        self.stages = self.stages[: sum(path.startswith("stages.") for path, _ in kept)]
        if last < len(self.feature_info) - 1:
            self.num_features = self.head_hidden_size = int(self.feature_info[last]["num_chs"])
            prune_head = True
        if prune_head:
            self.reset_classifier(0, "")
        return list(taken)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        classifier: nn.Module = self.head.fc
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Draw a new classifier, for another number of classes or another pooling."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head_hidden_size = self.head.num_features

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep the maps between stages only, and compute the others again in the backward pass."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns that tell timm which parameters belong together."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}


_Kind = TypeVar("_Kind", bound=Backbone)


def create(kind: type[_Kind], name: str, pretrained: bool, levels: int = 5, **kwargs: Any) -> _Kind:
    """Build a network as timm builds its own; `levels` is the number of those that it has."""
    features = {"out_indices": tuple(range(levels)), "flatten_sequential": True}
    model: _Kind = build_model_with_cfg(kind, name, pretrained, feature_cfg=features, **kwargs)
    return model


def config(**fields: Any) -> dict[str, Any]:
    """The configuration, as timm has it, of a network without weights; by default for ImageNet at 224 x 224."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0.conv",
        "classifier": "head.fc",
        **fields,
    }
