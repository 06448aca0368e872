"""se-surgery: squeeze-and-excitation for any CNN of timm, torchvision or your own.

>>> import se_surgery, timm
>>> model = timm.create_model("resnet50", pretrained=True)
>>> se_surgery.add_se(model, placement="standard", r=16)
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# The shell's Tab key asks the command line for words (see `complete`), and does not wait for timm.
if "_SE_SURGERY_COMPLETE" not in os.environ:
    from .models import se_models  # noqa: F401 - gives timm the names

__version__ = "0.1.0"

# Where each public name is at home. It is imported when it is first used: `import se_surgery` only registers names.
_HOMES = {
    "measuring.cost": ("Costs", "count_costs"),
    "errors": (
        "ArtefactError",
        "CheckpointError",
        "DataError",
        "FoldError",
        "HubError",
        "NothingToDoError",
        "OptionError",
        "PatientError",
        "PlacementError",
        "ProbeError",
        "RewriteError",
        "StageError",
        "SurgeryError",
        "SurgeryWarning",
        "TraceError",
        "VerifyError",
    ),
    "planning.exam": ("find_se",),
    "se.excite": ("SESpec", "SqueezeExcite"),
    "gates.excited": ("Excitations", "Gates", "excitations"),
    "files.export": ("export_se",),
    "structure.find": ("SESite",),
    "training.freezing": ("freeze_base", "unfreeze_base"),
    "surgery.graft": ("add_se",),
    "training.grouping": ("param_groups",),
    "files.load": ("LoadReport", "load_se"),
    "planning.plan": ("Plan", "Site", "Skipped"),
    "planning.planner": ("plan_se",),
    "files.pretrained": ("from_pretrained", "push_to_hub", "save_pretrained"),
    "proving.promises": ("Report", "verify"),
    "pruning.prune": ("prune_se", "record_pruning", "to_pruner_args"),
    "surgery.recipe": ("apply_recipe", "recipe_of"),
    "models.se_models": ("register_se", "unregister_se"),
    "surgery.strip": ("strip_se",),
    "gates.judge": ("tradeoff",),
    "gates.worth": ("Tradeoff", "Worth"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = list(_HOME_OF)

if TYPE_CHECKING:
    from .errors import ArtefactError as ArtefactError
    from .errors import CheckpointError as CheckpointError
    from .errors import DataError as DataError
    from .errors import FoldError as FoldError
    from .errors import HubError as HubError
    from .errors import NothingToDoError as NothingToDoError
    from .errors import OptionError as OptionError
    from .errors import PatientError as PatientError
    from .errors import PlacementError as PlacementError
    from .errors import ProbeError as ProbeError
    from .errors import RewriteError as RewriteError
    from .errors import StageError as StageError
    from .errors import SurgeryError as SurgeryError
    from .errors import TraceError as TraceError
    from .errors import VerifyError as VerifyError
    from .files.export import export_se as export_se
    from .files.load import LoadReport as LoadReport
    from .files.load import load_se as load_se
    from .files.pretrained import from_pretrained as from_pretrained
    from .files.pretrained import push_to_hub as push_to_hub
    from .files.pretrained import save_pretrained as save_pretrained
    from .gates.excited import Excitations as Excitations
    from .gates.excited import Gates as Gates
    from .gates.excited import excitations as excitations
    from .gates.judge import tradeoff as tradeoff
    from .gates.worth import Tradeoff as Tradeoff
    from .gates.worth import Worth as Worth
    from .measuring.cost import Costs as Costs
    from .measuring.cost import count_costs as count_costs
    from .models.se_models import register_se as register_se
    from .models.se_models import unregister_se as unregister_se
    from .planning.exam import find_se as find_se
    from .planning.plan import Plan as Plan
    from .planning.plan import Site as Site
    from .planning.plan import Skipped as Skipped
    from .planning.planner import plan_se as plan_se
    from .proving.promises import Report as Report
    from .proving.promises import verify as verify
    from .pruning.prune import prune_se as prune_se
    from .pruning.prune import record_pruning as record_pruning
    from .pruning.prune import to_pruner_args as to_pruner_args
    from .se.excite import SESpec as SESpec
    from .se.excite import SqueezeExcite as SqueezeExcite
    from .structure.find import SESite as SESite
    from .surgery.graft import add_se as add_se
    from .surgery.recipe import apply_recipe as apply_recipe
    from .surgery.recipe import recipe_of as recipe_of
    from .surgery.strip import strip_se as strip_se
    from .training.freezing import freeze_base as freeze_base
    from .training.freezing import unfreeze_base as unfreeze_base
    from .training.grouping import param_groups as param_groups
else:

    def __getattr__(name: str) -> Any:
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
