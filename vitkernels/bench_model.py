"""Whole models before and after `fuse`, in turns on the same machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from .bench import DTYPES, Case, quantiles, rounds, sampler, settings


def load_model(spec: str) -> tuple[torch.nn.Module, tuple[int, int, int]]:
    """A model with random weights and its input size (C, H, W); "timm:vit_small_patch16_224",
    "torchvision:vit_b_16" or "transformers:ViTModel" (its default configuration)."""
    source, _, name = spec.partition(":")
    if not name or source not in ("timm", "torchvision", "transformers"):
        raise ValueError(f"a model is timm:NAME, torchvision:NAME or transformers:CLASS, got {spec!r}")
    if source == "timm":
        import timm

        model = timm.create_model(name, pretrained=False)
        return model, tuple(timm.data.resolve_model_data_config(model)["input_size"])
    if source == "torchvision":
        import torchvision

        model = torchvision.models.get_model(name, weights=None)
        size = getattr(model, "image_size", 224)
        return model, (3, size, size)
    import transformers

    cls = getattr(transformers, name, None)
    if cls is None or getattr(cls, "config_class", None) is None:
        raise ValueError(f"transformers has no model class {name!r}")
    config = cls.config_class()
    config = getattr(config, "vision_config", config)
    return cls(cls.config_class()), (getattr(config, "num_channels", 3), config.image_size, config.image_size)


def bench_model(
    spec: str,
    *,
    batch: int = 8,
    device: torch.device | str = "cpu",
    dtype: str = "fp32",
    backend: str = "auto",
    seconds: float = 3.0,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Inference of a model before and after `fuse`, in turns: {"model", "rows", "fused", "ratio", "verdict"}."""
    from .fusing import fuse

    device = torch.device(device)
    progress(f"build {spec}")
    torch.manual_seed(0)
    model, shape = load_model(spec)
    model = model.to(device, DTYPES[dtype]).eval()
    images = torch.randn(batch, *shape, device=device).to(DTYPES[dtype])

    def run() -> torch.Tensor:
        out = model(images)
        return out if torch.is_tensor(out) else out[0]

    with torch.inference_mode(), settings(Case(dtype=dtype)):
        plain = run()
        # One model, rewired and back between samples: two copies would differ in where their weights lie.
        from .fusing import unfuse

        report = fuse(model, backend=backend)
        difference = ((run() - plain).norm() / plain.norm()).item()
        unfuse(model)

        def timed(fused: bool) -> Callable[[], float]:
            def sample() -> float:
                if fused:
                    fuse(model, backend=backend)
                run()
                ms = sampler(device, [run] * 3, 3)()
                if fused:
                    unfuse(model)
                return ms

            return sample

        progress(f"time {spec}")
        before, after = rounds([timed(False), timed(True)], seconds)
    ratios = [b / a for b, a in zip(before, after, strict=True)]
    gain = quantiles(ratios)
    rows = [
        {"case": spec, "mode": "forward", "dtype": dtype, "impl": impl, "ms": quantiles(t), "timing": "eager",
         "bytes": None, "flops": None, "roofline_share": None,
         "images_per_s": round(batch / statistics.median(t) * 1e3, 1)}
        for impl, t in (("before", before), ("fused", after))
    ]  # fmt: skip
    if gain["p20"] <= 1 <= gain["p80"]:
        verdict = f"No gain to be measured: {gain['median']:.3f} x, and the spread of the ratio includes 1."
    elif gain["median"] < 1:
        verdict = f"Fusing makes this model slower here: {gain['median']:.3f} x."
    else:
        verdict = f"{gain['median']:.3f} x the images a second ({gain['p20']:.3f} to {gain['p80']:.3f})."
    return {"rows": rows, "report": str(report), "difference": difference, "gain": gain, "verdict": verdict}
