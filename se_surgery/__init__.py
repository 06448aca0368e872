"""se-surgery: squeeze-and-excitation for any CNN of timm, torchvision or your own.

>>> import se_surgery, timm
>>> model = timm.create_model("resnet50", pretrained=True)
>>> se_surgery.add_se(model, placement="standard", r=16)
"""

from .cost import Costs, count_costs
from .errors import (
    ArtefactError,
    CheckpointError,
    DataError,
    HubError,
    NothingToDoError,
    OptionError,
    PatientError,
    PlacementError,
    ProbeError,
    StageError,
    SurgeryError,
    TraceError,
    VerifyError,
)
from .exam import find_se
from .excite import SESpec, SqueezeExcite
from .excited import Excitations, Gates, excitations
from .export import export_se
from .find import SESite
from .graft import add_se
from .load import LoadReport, load_se
from .plan import Plan, Site, Skipped
from .planner import plan_se
from .pretrained import from_pretrained, push_to_hub, save_pretrained
from .promises import Report, verify
from .recipe import apply_recipe, recipe_of
from .se_models import register_se, unregister_se
from .strip import strip_se

__version__ = "0.1.0"

__all__ = [
    "ArtefactError",
    "CheckpointError",
    "Costs",
    "DataError",
    "Excitations",
    "Gates",
    "HubError",
    "LoadReport",
    "NothingToDoError",
    "OptionError",
    "PatientError",
    "PlacementError",
    "Plan",
    "ProbeError",
    "Report",
    "SESite",
    "SESpec",
    "Site",
    "Skipped",
    "SqueezeExcite",
    "StageError",
    "SurgeryError",
    "TraceError",
    "VerifyError",
    "add_se",
    "apply_recipe",
    "count_costs",
    "excitations",
    "export_se",
    "find_se",
    "from_pretrained",
    "load_se",
    "plan_se",
    "push_to_hub",
    "recipe_of",
    "register_se",
    "save_pretrained",
    "strip_se",
    "unregister_se",
    "verify",
]
