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
    from weightlab.networks.names import file_order
    from weightlab.networks.trust import trusting_remote_code
    from weightlab.ops.apply import apply
    from weightlab.ops.compose import compose
    from weightlab.ops.connectivity import connectivity
    from weightlab.ops.diff import diff
    from weightlab.ops.inspect import inspect
    from weightlab.ops.lora import lora_export, lora_extract, lora_import
    from weightlab.ops.merge import merge
    from weightlab.ops.recycle import recycle
    from weightlab.ops.signature import signature
    from weightlab.ops.similarity import compare, identify
    from weightlab.ops.stack import remove, scale, status
    from weightlab.ops.transfer import transfer
    from weightlab.ops.verify import verify
    from weightlab.patches.patch import Patch, open_patch
    from weightlab.runtime.patched import PatchStack, patched
    from weightlab.runtime.recalibrate import recalibrate
    from weightlab.stream.executor import Resources
    from weightlab.twin.export import twin_export
    from weightlab.twin.folder import Twin, open_twin
    from weightlab.twin.mixture import only_largest
    from weightlab.twin.model import TwinModel
    from weightlab.twin.route import route
    from weightlab.twin.routing import save_router
    from weightlab.twin.split import twin_split

_WHERE = {
    "Patch": "weightlab.patches.patch",
    "PatchStack": "weightlab.runtime.patched",
    "Resources": "weightlab.stream.executor",
    "Twin": "weightlab.twin.folder",
    "TwinModel": "weightlab.twin.model",
    "apply": "weightlab.ops.apply",
    "compare": "weightlab.ops.similarity",
    "compose": "weightlab.ops.compose",
    "connectivity": "weightlab.ops.connectivity",
    "diff": "weightlab.ops.diff",
    "file_order": "weightlab.networks.names",
    "identify": "weightlab.ops.similarity",
    "inspect": "weightlab.ops.inspect",
    "lora_export": "weightlab.ops.lora",
    "lora_extract": "weightlab.ops.lora",
    "lora_import": "weightlab.ops.lora",
    "merge": "weightlab.ops.merge",
    "only_largest": "weightlab.twin.mixture",
    "open_patch": "weightlab.patches.patch",
    "open_twin": "weightlab.twin.folder",
    "patched": "weightlab.runtime.patched",
    "recalibrate": "weightlab.runtime.recalibrate",
    "recycle": "weightlab.ops.recycle",
    "remove": "weightlab.ops.stack",
    "route": "weightlab.twin.route",
    "save_router": "weightlab.twin.routing",
    "scale": "weightlab.ops.stack",
    "signature": "weightlab.ops.signature",
    "status": "weightlab.ops.stack",
    "transfer": "weightlab.ops.transfer",
    "trusting_remote_code": "weightlab.networks.trust",
    "twin_export": "weightlab.twin.export",
    "twin_split": "weightlab.twin.split",
    "verify": "weightlab.ops.verify",
}

__all__ = [
    "Patch",
    "PatchStack",
    "Resources",
    "Twin",
    "TwinModel",
    "WeightlabError",
    "__version__",
    "apply",
    "compare",
    "compose",
    "connectivity",
    "diff",
    "file_order",
    "identify",
    "inspect",
    "lora_export",
    "lora_extract",
    "lora_import",
    "merge",
    "only_largest",
    "open_patch",
    "open_twin",
    "patched",
    "recalibrate",
    "recycle",
    "remove",
    "route",
    "save_router",
    "scale",
    "signature",
    "status",
    "transfer",
    "trusting_remote_code",
    "twin_export",
    "twin_split",
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
