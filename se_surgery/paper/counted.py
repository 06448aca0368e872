"""What is counted here: parameters and multiply-adds of the paper's networks.

In: rows of `printed`. Out: counts. The networks are on the meta device: they have shapes and no values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from timm.models.resnet import Bottleneck
from torch import nn

from ..measuring.cost import multiply_adds
from ..models.bases import create_base
from ..models.catalog import shipped_recipe
from ..planning.exam import Exam
from ..planning.options import Options, check_options
from ..planning.plan import Plan
from ..planning.planner import make_plan
from .printed import Network, Variant


@dataclass(frozen=True)
class Counted:
    """What a network of tables 2 and 3 costs at r = 16, without biases.

    Attributes:
        parameters: Parameters of the base.
        parameters_added: Those of its SEs.
        macs: Multiply-adds of the base.
        macs_added: Those of its SEs.
        macs_strided: Multiply-adds of the base with the stride where the paper has it.
        additions: Additions with which shortcuts are joined, one for every value.
    """

    parameters: int
    parameters_added: int
    macs: int
    macs_added: int
    macs_strided: int
    additions: int


@dataclass(frozen=True)
class CountedVariant:
    """What a variant comes to.

    Attributes:
        sites: Number of SEs.
        parameters: Parameters, without biases in the SEs.
        as_printed: Parameters and running statistics, with biases in the SEs: what table 10 counts.
    """

    sites: int
    parameters: int
    as_printed: int


class Networks:
    """The networks that were looked at, each once."""

    def __init__(self) -> None:
        self._exams: dict[str, Exam] = {}

    def plan(self, base: str, options: Options | None = None) -> Plan:
        """What putting SEs into a base would come to; by default at r = 16, without biases."""
        if base not in self._exams:
            with torch.device("meta"):
                self._exams[base] = Exam(create_base(base))
        return make_plan(self._exams[base], options or Options())

    def count(self, network: Network) -> Counted:
        """Count a network of tables 2 and 3."""
        plan = self.plan(network.base)
        model = plan.exam.seen.model
        macs = multiply_adds(model)
        if network.strided_first:
            with torch.device("meta"):
                model = create_base(network.base)
            _stride_first(model)
        return Counted(
            parameters=plan.params_before,
            parameters_added=plan.params_added,
            macs=macs,
            macs_added=plan.macs_added,
            macs_strided=multiply_adds(model) if network.strided_first else macs,
            additions=sum(site.channels * math.prod(site.size) for site in plan.sites if site.kind == "residual"),
        )

    def count_variant(self, variant: Variant) -> CountedVariant:
        """Count what a recipe of `registry/` makes, or a base."""
        if not variant.recipe.startswith("se_"):
            plan = self.plan(variant.recipe)
            return CountedVariant(0, plan.params_before, plan.params_before + plan.buffers_before)
        recipe = shipped_recipe(variant.recipe)
        options = check_options(**recipe["operations"][0]["options"])
        plan = self.plan(recipe["base"], options)
        biased = self.plan(recipe["base"], replace(options, bias=(True, True)))
        return CountedVariant(
            sites=len(plan.sites),
            parameters=plan.params_before + plan.params_added,
            as_printed=biased.params_before + biased.params_added + biased.buffers_before,
        )


def _stride_first(model: nn.Module) -> None:
    """Move the stride of every unit from its 3x3 convolution to the 1x1 before it, as in the paper's ResNets."""
    for module in model.modules():
        if isinstance(module, Bottleneck):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
