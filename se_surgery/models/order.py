"""Order: a base that timm is asked for, in one of its forms.

In: a base's name, and the arguments of `timm.create_model`. Out: the base, or a sketch of it without values.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from timm.models import is_model_in_modules
from torch import nn

from ..errors import SurgeryError
from ..files.sources import KEYS, Checkpoint, as_dict, names_a_source
from .bases import create_base

# What is done to a fresh base, in place.
Surgery = Callable[[nn.Module], Any]
# Arguments that a network takes behind `features_only` alone, and the modules of timm of which one more is.
_FEATURES_ARGUMENTS = frozenset({"out_indices", "feature_cls", "feature_location"})
_DILATED_AS_FEATURES = ("mobilenetv3", "hardcorenas")


@dataclasses.dataclass(frozen=True)
class Order:
    """A base that is asked for, in one of its forms."""

    base: str
    pretrained_cfg: Any
    overlay: dict[str, Any]
    cache_dir: Any
    kwargs: dict[str, Any]

    def create(self, pretrained: bool, **more: Any) -> nn.Module:
        """The base."""
        given = {"pretrained_cfg": self.pretrained_cfg, "pretrained_cfg_overlay": self.overlay or None}
        # A copy, because timm takes out of `feature_cfg` what it has read.
        kwargs = copy.deepcopy(self.kwargs)
        return create_base(self.base, pretrained, **given, cache_dir=self.cache_dir, **{**kwargs, **more})

    @property
    def names_a_source(self) -> bool:
        """Whether weights were named, other than the base's own."""
        return names_a_source(self.pretrained_cfg, self.overlay)

    @property
    def config(self) -> dict[str, Any]:
        """What was given of the configuration."""
        return {**as_dict(self.pretrained_cfg), **self.overlay}

    def without_source(self) -> Order:
        """The same, with the weights left out that were named."""
        left_out = (*KEYS, "hf_hub_filename", "source", "architecture")
        given = self.pretrained_cfg
        if given is not None and not isinstance(given, str):
            given = {key: value for key, value in as_dict(given).items() if key not in left_out}
        overlay = {key: value for key, value in self.overlay.items() if key not in left_out}
        return dataclasses.replace(self, pretrained_cfg=given, overlay=overlay)

    def without_features(self) -> Order:
        """The same, with the arguments left out that the whole network does not take."""
        left_out = set(_FEATURES_ARGUMENTS)
        if is_model_in_modules(self.base.partition(".")[0], _DILATED_AS_FEATURES):
            left_out.add("output_stride")
        kwargs = {key: value for key, value in self.kwargs.items() if key not in left_out}
        return dataclasses.replace(self, kwargs=kwargs)

    def with_weights(self, checkpoint: Checkpoint) -> Order:
        """The same, with a base's checkpoint."""
        return dataclasses.replace(self, overlay={**self.overlay, "state_dict": checkpoint.tensors})

    def sketch(self, surgery: Surgery | None = None, **more: Any) -> nn.Module:
        """The model without values, to learn what it has; with values where it cannot do without."""
        try:
            with torch.device("meta"):
                model = self.create(False, **more)
            if surgery is not None:
                surgery(model)
        except SurgeryError as error:
            # Torch refuses a constructor or a forward that wants the values.
            if not isinstance(error.__cause__, RuntimeError):
                raise
            model = self.create(False, **more)
            if surgery is not None:
                surgery(model)
        return model
