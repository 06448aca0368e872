"""Ways: everything that is tried of an operated model, in the order of a report.

In: nothing. Out: `WAYS`, a table of names and judges. A judge goes one way with a `Pair`; where the base itself cannot
go it, nothing was promised, whatever the model is called. Where only the operated model cannot, or comes out elsewhere,
the promise is broken.
"""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass

from timm.models import FeatureDictNet, FeatureHookNet, FeatureListNet
from timm.models._features import FeatureGetterNet

from .compare import Outcome
from .compilers import (
    Lowered,
    compiled,
    exported,
    extracted,
    feature_graph,
    features,
    fresh_caches,
    last_output,
    onnx_session,
)
from .gated import Judge, flattened, gated, head, method, wrapped
from .lives import again, checkpointed, folded, pickled, reached
from .pair import Pair
from .where import placed


@dataclass(frozen=True)
class Way:
    """One way into a model, or one thing that is done to it.

    Attributes:
        name: What a report calls it.
        judge: Tries it with both models and compares.
        thorough: Whether it takes long: a compiler, an exporter.
        needs: Packages without which it is not tried.
        extra: The extra of this package that installs them.
    """

    name: str
    judge: Judge
    thorough: bool = False
    needs: tuple[str, ...] = ()
    extra: str = ""

    def tried(self, pair: Pair) -> Outcome:
        """What comes of it."""
        missing = [package for package in self.needs if importlib.util.find_spec(package) is None]
        if missing:
            return Outcome(None, f"not tried: install {missing[0]}, with pip install 'se-surgery[{self.extra}]'")
        return self.judge(pair)


WAYS = (
    Way("forward, evaluation", gated()),
    Way("forward, training", gated(training=True)),
    Way("where", placed),
    Way("gradients", reached),
    # timm's methods, and its wrappers around models of features.
    Way("forward_features", gated(method("forward_features"))),
    Way("forward_head", gated(head)),
    Way("forward_intermediates", gated(method("forward_intermediates"))),
    Way("features_only, list", gated(flattened(FeatureListNet))),
    Way("features_only, dict", gated(flattened(FeatureDictNet))),
    Way("features_only, hook", gated(wrapped(FeatureHookNet))),
    Way("features_only, getter", gated(wrapped(FeatureGetterNet))),
    Way("features_only, graph", Lowered(feature_graph, features)),
    Way("set_grad_checkpointing", checkpointed),
    Way("reparameterize", folded),
    Way("deepcopy", again(copy.deepcopy)),
    Way("pickle", again(pickled)),
    Way(
        "create_feature_extractor",
        Lowered(extracted, last_output),
        thorough=True,
        needs=("torchvision",),
        extra="torchvision",
    ),
    Way("torch.export", Lowered(exported), thorough=True),
    Way("torch.compile, evaluation", Lowered(compiled, gradients=False, around=fresh_caches), thorough=True),
    Way("torch.compile, training", Lowered(compiled, training=True, around=fresh_caches), thorough=True),
    Way(
        "ONNX",
        Lowered(onnx_session, gradients=False),
        thorough=True,
        needs=("onnx", "onnxscript", "onnxruntime"),
        extra="onnx",
    ),
)
