"""se-surgery: squeeze-and-excitation for any CNN of timm, torchvision or your own.

>>> import se_surgery, timm
>>> model = timm.create_model("resnet50", pretrained=True)
>>> se_surgery.add_se(model, placement="standard", r=16)
"""

from .errors import (
    DataError,
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
from .find import SESite
from .graft import add_se
from .plan import Plan, Site, Skipped
from .planner import plan_se
from .promises import Report, verify
from .recipe import apply_recipe, recipe_of
from .strip import strip_se

__version__ = "0.1.0"

__all__ = [
    "DataError",
    "Excitations",
    "Gates",
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
    "excitations",
    "find_se",
    "plan_se",
    "recipe_of",
    "strip_se",
    "verify",
]
