"""benchmarks/coverage.py, of a few architectures."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "coverage.py"


@pytest.fixture(scope="module")
def coverage():
    spec = importlib.util.spec_from_file_location("architectures_covered", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


EXPECTED = {
    "timm": {
        "vit_tiny_patch16_224": "whole", "eva02_tiny_patch14_224": "whole",
        "swin_tiny_patch4_window7_224": "projection", "vit_tiny_r_s16_p8_224": "left", "resnet18": None,
    },
    "torchvision": {"vit_b_32": "whole", "convnext_tiny": "projection", "alexnet": None},
    "transformers": {"clip_vision_model": "whole", "swin": "projection", "siglip2_vision_model": "left"},
    "vit_pytorch": {"simple_vit.SimpleViT": "projection", "normalized_vit.nViT": "left"},
}  # fmt: skip


@pytest.mark.parametrize("library", EXPECTED)
def test_levels(coverage, library):
    pytest.importorskip(library)
    wanted, levels, rows = EXPECTED[library], {}, {}
    for name, build in coverage.LIBRARIES[library]():
        if name in wanted:
            found = coverage.row_of(library, name, build)
            levels[name] = found and found[1]["level"]
            rows |= [found] if found else []
    assert levels == {name: level for name, level in wanted.items() if name in levels}
    assert levels.keys() >= {name for name, level in wanted.items() if level}
    page = coverage.page({library: rows})
    assert f"| {len(rows)} |" in page
    assert all(name in page for name in rows)
