"""vitkernels: the front end of every Vision Transformer as one kernel, pixels in, tokens out."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .cost_model import roofline
    from .functional import explain, patch_embed
    from .fusing import fuse, unfuse
    from .layers import PatchEmbed
    from .models import ViT

_HOME = {
    "patch_embed": "functional",
    "explain": "functional",
    "PatchEmbed": "layers",
    "ViT": "models",
    "fuse": "fusing",
    "unfuse": "fusing",
    "roofline": "cost_model",
}
__all__ = ["PatchEmbed", "ViT", "explain", "fuse", "patch_embed", "roofline", "unfuse"]


def __getattr__(name: str):
    if name in _HOME:
        value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_HOME})
