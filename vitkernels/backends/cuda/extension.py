"""The compiled module of csrc/, `vitkernels._cuda`, where there is one, and the reason where there is none."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

NAME = "vitkernels._cuda"
HOW = "build it with VITKERNELS_CUDA=1 pip install ."


@lru_cache
def load() -> ModuleType:
    """The extension; ImportError where there is none."""
    return import_module(NAME)


@lru_cache
def missing() -> str:
    """Why `load` fails; "" where it does not."""
    try:
        load()
    except ImportError as error:
        found = record()
        if error.name != NAME or not isinstance(error, ModuleNotFoundError):
            return f"the CUDA C++ extension can't be loaded: {error}"
        if found["built"]:
            return f"the CUDA C++ extension was built for another Python, as {found['file']}; {HOW}"
        return f"the CUDA C++ extension was not built: {found['reason']}; {HOW}"
    return ""


def record() -> dict[str, Any]:
    """What setup.py wrote down when this package was built."""
    try:
        return json.loads((Path(__file__).parents[2] / "_cuda_build.json").read_text())
    except FileNotFoundError:
        return {"built": False, "reason": "the package runs from its sources"}


def about() -> str:
    """One line: built with what and for which GPUs, or why not."""
    reason, found = missing(), record()
    return reason or f"nvcc {found.get('nvcc', '?')} for {', '.join(found.get('archs', '?'))}"
