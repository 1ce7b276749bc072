"""weightlab: arithmetic on model weights. Take a difference, keep it as a patch, put it on a model and take it off.

    import weightlab as wl
    p = wl.diff("base", "tuned", out="p.safetensors")
    wl.apply("base", 0.5 * p, out="model")

Names are imported when they are first used, so that `import weightlab` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from weightlab.errors import WeightlabError
from weightlab.version import __version__

if TYPE_CHECKING:
    from weightlab.ops.apply import apply
    from weightlab.ops.compose import compose
    from weightlab.ops.diff import diff
    from weightlab.ops.inspect import inspect
    from weightlab.ops.stack import remove, scale, status
    from weightlab.ops.verify import verify
    from weightlab.patches.patch import Patch, open_patch
    from weightlab.runtime.patched import PatchStack, patched
    from weightlab.stream.executor import Resources

_WHERE = {
    "Patch": "weightlab.patches.patch",
    "PatchStack": "weightlab.runtime.patched",
    "Resources": "weightlab.stream.executor",
    "apply": "weightlab.ops.apply",
    "compose": "weightlab.ops.compose",
    "diff": "weightlab.ops.diff",
    "inspect": "weightlab.ops.inspect",
    "open_patch": "weightlab.patches.patch",
    "patched": "weightlab.runtime.patched",
    "remove": "weightlab.ops.stack",
    "scale": "weightlab.ops.stack",
    "status": "weightlab.ops.stack",
    "verify": "weightlab.ops.verify",
}

__all__ = [
    "Patch",
    "PatchStack",
    "Resources",
    "WeightlabError",
    "__version__",
    "apply",
    "compose",
    "diff",
    "inspect",
    "open_patch",
    "patched",
    "remove",
    "scale",
    "status",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'weightlab' has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
