"""Pack: a model as the configuration and tensors it will be saved as, proven to give the same model again.

In: a model. Out: a `Pack`. Before it is one, the model is built anew from it and both are run: what a configuration
does not say (an `output_stride`, an activation) would otherwise be lost without a word. Nothing is written, and the
model is left as found.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.models import FeatureDictNet, FeatureGraphNet, FeatureHookNet, FeatureListNet
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from ..errors import ArtefactError, PatientError, ProbeError, SurgeryError
from ..measuring.cost import Costs, count_costs, parameters
from ..proving.compare import deviation, reason, same_tensors, tensors_in
from ..proving.pair import noise, randomise, twin, undisturbed
from ..reading.encoded import refuse_encoded
from ..reading.look import look
from ..reading.wrappers import unwrapped
from ..surgery.graft import copied
from .artefact import OWN
from .assemble import assemble
from .describe import base_name, full_config, full_recipe
from .sources import Checkpoint
from .strict import REMEDY, problems
from .tensorfile import tensors_of

_SHARDED = {"FullyShardedDataParallel", "FSDPModule"}
_FEATURES = (FeatureListNet, FeatureDictNet, FeatureHookNet, FeatureGraphNet)


@dataclass(frozen=True)
class Pack:
    """A model that can be saved.

    Attributes:
        config: What `config.json` will say.
        tensors: All values.
        parameters: Number of parameters.
        costs: What it costs, or None where it cannot be counted, as with detectors that read values of their maps.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    parameters: int
    costs: Costs | None

    @property
    def recipe(self) -> dict[str, Any]:
        """The model's recipe."""
        recipe: dict[str, Any] = self.config["model_args"]["recipe"]
        return recipe

    @property
    def metadata(self) -> dict[str, str]:
        """What the weights' file says of itself."""
        return {"format": "pt", OWN: json.dumps(self.config)}

    def with_description(self, changes: Mapping[str, Any]) -> Pack:
        """The same with other fields in `pretrained_cfg`; None leaves one out. Nothing is computed from them."""
        described = {**self.config["pretrained_cfg"], **changes}
        described = {key: value for key, value in described.items() if value is not None}
        return replace(self, config={**self.config, "pretrained_cfg": described})


def pack(
    model: nn.Module, base: Any = None, base_args: Mapping[str, Any] | None = None, example_input: Any = None
) -> Pack:
    """Make a model ready to be saved.

    Args:
        model: The model; one in DataParallel, DistributedDataParallel or torch.compile is taken out of it.
        base: Name of its base, by default what the model knows of itself; for a model of your own class a fresh one of
            that class.
        base_args: Arguments of the base besides those that the model knows of itself.
        example_input: What to run the model with, as for `add_se`.

    Raises:
        SurgeryError: The model cannot be saved, or would not be the same again.
    """
    bare = _bare(model)
    tensors = tensors_of(bare)
    bare.to("cpu")
    _refuse_values(tensors, bare)
    own = base if isinstance(base, nn.Module) else None
    recipe = full_recipe(bare, None if own is not None else base_name(bare, base), base_args)
    config = full_config(bare, recipe, tensors)
    said = f"base={recipe['base']!r}, base_args={recipe['base_args']}"
    remedy = f"Give base and base_args as the model was made with; by now they are {said}. What was put into it since, "
    remedy += "other than by this library, cannot be saved."
    try:
        with undisturbed():
            built = assemble(config, Checkpoint(tensors, {}, "The model"), own)
    except SurgeryError as error:
        reason_given = str(error).removesuffix(REMEDY).rstrip()
        raise ArtefactError(f"The model cannot be built anew: {reason_given} {remedy}") from error
    _compare(bare, built, remedy, example_input)
    return Pack(config, tensors, parameters(bare)[0], _costs(built, example_input))


def _costs(model: nn.Module, example_input: Any) -> Costs | None:
    try:
        return count_costs(model, example_input)
    except ProbeError:
        return None


def _bare(model: nn.Module) -> nn.Module:
    """The model itself, out of what wraps it and without hooks, which are the user's; it shares the values."""
    model = unwrapped(model)
    if not isinstance(model, nn.Module) or isinstance(model, _FEATURES):
        raise PatientError(f"A {type(model).__name__} cannot be saved. Give the whole network that it was made of.")
    sharded = next((m for m in model.modules() if {c.__name__ for c in type(m).__mro__} & _SHARDED), None)
    if sharded is not None:
        raise PatientError(
            f"{type(sharded).__name__} has its parameters in shards on several machines. Gather its full state dict, "
            f"load that into a bare model that was operated on in the same way, and save that."
        )
    named = (*model.named_parameters(), *model.named_buffers())
    lazy = next((name for name, tensor in named if is_lazy(tensor)), None)
    if lazy is not None:
        raise PatientError(f"{lazy!r} of the model is lazy and has no values yet. Run it on one batch, then save it.")
    refuse_encoded(model, "saved: files of weights hold plain tensors")
    bare = twin(model)
    for module in bare.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return bare


def _refuse_values(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse values that would not be loaded again: NaN above all."""
    found = problems(tensors, model)
    if found:
        raise ArtefactError(f"The model cannot be saved: {found[0]}. Train it from a state without such values.")


def _compare(bare: nn.Module, built: nn.Module, remedy: str, example_input: Any) -> None:
    """Refuse a model that does not compute what the one it was built from does.

    Both are run as they are, and with normalisations and what is zero drawn anew: a branch that is multiplied by zero
    hides whatever is in it. Both are run in one memory layout, which decides the order of sums, and in float32 where
    they are not in float64 altogether: every CPU can.
    """
    if not all(parameter.dtype == torch.float64 for parameter in bare.parameters()):
        bare, built = bare.float(), built.float()
    for parameter in bare.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    inputs = noise(look(bare, example_input).args)
    for first, draw in ((bare, False), (copied(bare), True)):
        found = [_run(model, inputs, draw) for model in (first, built)]
        if not same_tensors(*found):
            raise ArtefactError(
                f"Built anew, the model does not compute the same: its outputs differ by {deviation(*found):.2g} of "
                f"their range. {remedy}"
            )


def _run(model: nn.Module, inputs: tuple[Any, ...], draw: bool) -> list[Tensor]:
    with undisturbed():
        if draw:
            randomise(model)
        try:
            with torch.no_grad():
                return tensors_in(model.eval()(*pytree.tree_map_only(Tensor, torch.clone, inputs)))
        except Exception as error:  # whatever the model's own code raises
            raise ProbeError(
                f"{type(model).__name__} does not run on the CPU ({reason(error)}), so that what would be saved cannot "
                f"be compared with it. Give an example_input that it takes."
            ) from error
