"""The chain of PyTorch operations that `patch_embed` replaces in fp64: the oracle of tests and gates.

It shares nothing with the reference backend.
"""

from __future__ import annotations

from typing import Any

import torch

from ..eager import eager

LEARNT = ("weight", "bias", "pos_embed", "prefix", "images")  # what has a gradient
Arguments = dict[str, Any]  # of `patch_embed`, by name


def oracle(**arguments: Any) -> torch.Tensor:
    """`eager` in fp64."""
    with torch.autocast(arguments["images"].device.type, enabled=False):
        return eager(**{**arguments, "weight": arguments["weight"].double(), "out_dtype": torch.float64})
