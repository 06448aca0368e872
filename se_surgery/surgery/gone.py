"""Gone: what stands in the place of a method whose children were taken out of its block.

In: what the method lacks. Out: a callable that says so. Children are taken out before another forward is put in place
(`del self.bn`, then `self.forward = self.forward_fuse`), so the error has to wait until somebody calls the former.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import SurgeryError
from ..records import durable

REMEDY = (
    "Do so first and operate then: strip_se(model, origin='se_surgery') undoes the operation, and add_se puts SEs "
    "into what came of it."
)


@durable
@dataclass
class Gone:
    """Stands on an operated block in the place of a method that cannot run any more, and says so when it is called.

    Attributes:
        cls: Name of the block's class.
        method: Name of the method.
        children: What the method needs and the block has no more.
        before: What stood there on the instance; None where nothing did.
    """

    cls: str
    method: str
    children: tuple[str, ...]
    before: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Say what is missing.

        Raises:
            SurgeryError: Always.
        """
        raise SurgeryError(
            f"The {self.method} of this operated {self.cls} needs {', '.join(map(repr, self.children))}, which was "
            f"taken out of it or replaced by what cannot be called, after surgery. {REMEDY}"
        )
