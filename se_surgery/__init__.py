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
    from . import se_models  # noqa: F401 - gives timm the names

__version__ = "0.1.0"

# Where each public name is at home. It is imported when it is first used: `import se_surgery` only registers names.
_HOMES = {
    "cost": ("Costs", "count_costs"),
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
        "StageError",
        "SurgeryError",
        "TraceError",
        "VerifyError",
    ),
    "exam": ("find_se",),
    "excite": ("SESpec", "SqueezeExcite"),
    "excited": ("Excitations", "Gates", "excitations"),
    "export": ("export_se",),
    "find": ("SESite",),
    "freezing": ("freeze_base", "unfreeze_base"),
    "graft": ("add_se",),
    "grouping": ("param_groups",),
    "load": ("LoadReport", "load_se"),
    "plan": ("Plan", "Site", "Skipped"),
    "planner": ("plan_se",),
    "pretrained": ("from_pretrained", "push_to_hub", "save_pretrained"),
    "promises": ("Report", "verify"),
    "prune": ("prune_se", "record_pruning", "to_pruner_args"),
    "recipe": ("apply_recipe", "recipe_of"),
    "se_models": ("register_se", "unregister_se"),
    "strip": ("strip_se",),
    "judge": ("tradeoff",),
    "worth": ("Tradeoff", "Worth"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = list(_HOME_OF)

if TYPE_CHECKING:
    from .cost import Costs as Costs
    from .cost import count_costs as count_costs
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
    from .errors import StageError as StageError
    from .errors import SurgeryError as SurgeryError
    from .errors import TraceError as TraceError
    from .errors import VerifyError as VerifyError
    from .exam import find_se as find_se
    from .excite import SESpec as SESpec
    from .excite import SqueezeExcite as SqueezeExcite
    from .excited import Excitations as Excitations
    from .excited import Gates as Gates
    from .excited import excitations as excitations
    from .export import export_se as export_se
    from .find import SESite as SESite
    from .freezing import freeze_base as freeze_base
    from .freezing import unfreeze_base as unfreeze_base
    from .graft import add_se as add_se
    from .grouping import param_groups as param_groups
    from .judge import tradeoff as tradeoff
    from .load import LoadReport as LoadReport
    from .load import load_se as load_se
    from .plan import Plan as Plan
    from .plan import Site as Site
    from .plan import Skipped as Skipped
    from .planner import plan_se as plan_se
    from .pretrained import from_pretrained as from_pretrained
    from .pretrained import push_to_hub as push_to_hub
    from .pretrained import save_pretrained as save_pretrained
    from .promises import Report as Report
    from .promises import verify as verify
    from .prune import prune_se as prune_se
    from .prune import record_pruning as record_pruning
    from .prune import to_pruner_args as to_pruner_args
    from .recipe import apply_recipe as apply_recipe
    from .recipe import recipe_of as recipe_of
    from .se_models import register_se as register_se
    from .se_models import unregister_se as unregister_se
    from .strip import strip_se as strip_se
    from .worth import Tradeoff as Tradeoff
    from .worth import Worth as Worth
else:

    def __getattr__(name: str) -> Any:
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
