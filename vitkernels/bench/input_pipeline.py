"""From a decoder's bytes to tokens: what floats cost on the way, and what is left of it where pixels stay uint8.

Everything is done by one process, one batch after the other. A loader with several workers decodes and makes batches
beside the GPU's work: then what counts is the slowest stage, not the sum.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from io import BytesIO
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch

from ..functional import patch_embed
from .baselines import conv
from .cases import DTYPES, IMAGENET, Case
from .gate import judged
from .model_zoo import MODELS, load_model
from .op import settings
from .sample_images import jpegs
from .timing import quantiles, rounded, rounds

STAGES = ("batch", "copy", "front_end")
PIPELINES = {
    "float": "floats, normalised image by image on the CPU, as in torchvision's ToTensor and Normalize",
    "normalise_on_device": "uint8 to the device, normalised there, convolved",
    "uint8": "uint8 to the device and into one call",
}


def bench_pipeline(
    spec: str = "timm:vit_base_patch16_224",
    *,
    batch: int = 64,
    device: torch.device | str = "cpu",
    dtype: str = "fp32",
    backend: str = "auto",
    seconds: float = 3.0,
    keep_samples: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """JPEG photographs to the tokens of a model's front end, by each of PIPELINES, in turns.

    Args as in `model.bench_model`; of the model only its projection is used, with random positions and a class
    token.

    Returns:
        "rows", one a pipeline: "ms" and "images_per_s" from decoded images [H,W,3] to tokens; "stages", the medians of
        "batch" (to one tensor in memory that the device can copy), "copy" (to the device) and "front_end", ms;
        "bus_bytes", what "copy" moves; "ms_with_decode". "decode", ms; "gain", of "uint8" over "float" without and
        "gain_with_decode" with the decode; "verdict". One whose tokens break the accuracy rule has no time.

    Raises:
        ValueError: the model has no projection of images of three channels by a Conv2d.
    """
    device = torch.device(device)
    progress(f"{spec}: photographs")
    weight, bias, size = _projection(spec, device, DTYPES[dtype])
    files = list(islice(cycle(jpegs()), batch))
    with settings(Case(dtype=dtype)), torch.no_grad():
        return _Pipeline(weight, bias, size, files, backend).run(
            {"case": MODELS.get(spec, spec), "mode": "pipeline", "dtype": dtype, "batch": batch, "timing": "eager"},
            seconds, keep_samples, progress,
        )  # fmt: skip


def decoded(file: bytes, size: tuple[int, int]) -> np.ndarray:
    """A JPEG file, resized and cropped around its middle: [H,W,3] uint8."""
    from PIL import Image, ImageOps

    with Image.open(BytesIO(file)) as image:
        return np.array(ImageOps.fit(image.convert("RGB"), (size[1], size[0]), Image.Resampling.BILINEAR))


def _projection(
    spec: str, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None, tuple[int, int]]:
    torch.manual_seed(0)
    model, shape = load_model(spec)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.in_channels == 3 and module.stride == module.kernel_size:
            bias = None if module.bias is None else module.bias.detach().to(device, dtype)
            return module.weight.detach().to(device, dtype), bias, (shape[-2], shape[-1])
    raise ValueError(f"the pipeline is for images of three channels and a Conv2d's projection; {spec} has none")


class _Pipeline:
    def __init__(self, weight, bias, size, files: list[bytes], backend: str):
        self.files, self.size, self.backend, self.device = files, size, backend, weight.device
        D, _, P_h, P_w = weight.shape
        N = (size[0] // P_h) * (size[1] // P_w)
        g = torch.Generator().manual_seed(0)
        position, token = (torch.randn(1, n, D, generator=g).to(weight) / 10 for n in (1 + N, 1))
        self.learnt: dict[str, Any] = {"weight": weight, "bias": bias, "pos_embed": position, "prefix": token}
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in IMAGENET.values())
        # (x/255 - mean)/std = a·x + b, as one pass on the device takes it
        self.a = (1 / (255 * self.std)).to(weight)
        self.b = (-self.mean / self.std).to(weight)
        self.arrays = self.decode()

    # --- The stages.

    def decode(self) -> list[np.ndarray]:
        return [decoded(file, self.size) for file in self.files]

    def floats(self, arrays: list[np.ndarray]) -> torch.Tensor:
        each = []
        for array in arrays:
            x = torch.from_numpy(array).permute(2, 0, 1).contiguous().float().div_(255)
            each.append(x.sub_(self.mean).div_(self.std))
        return self.ready(torch.stack(each))

    def bytes(self, arrays: list[np.ndarray]) -> torch.Tensor:
        return self.ready(torch.from_numpy(np.stack(arrays)))

    def ready(self, images: torch.Tensor) -> torch.Tensor:
        return images.pin_memory() if self.device.type == "cuda" else images

    def copy(self, images: torch.Tensor) -> torch.Tensor:
        return images.to(self.device, non_blocking=True)

    def convolve(self, images: torch.Tensor) -> torch.Tensor:
        return conv(images.to(self.a.dtype), **self.learnt, keep=None, a=None, b=None)

    def normalise_and_convolve(self, images: torch.Tensor) -> torch.Tensor:
        return conv(images.permute(0, 3, 1, 2), **self.learnt, keep=None, a=self.a, b=self.b)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        pixels: dict[str, Any] = {"images": images.permute(0, 3, 1, 2), **IMAGENET}
        return patch_embed(**pixels, **self.learnt, backend=self.backend)

    def pipeline(self, name: str) -> list[Callable[[Any], Any]]:
        return {
            "float": [self.floats, self.copy, self.convolve],
            "normalise_on_device": [self.bytes, self.copy, self.normalise_and_convolve],
            "uint8": [self.bytes, self.copy, self.embed],
        }[name]

    def why_wrong(self, name: str) -> str | None:
        x: Any = self.arrays
        for stage in self.pipeline(name):
            x = stage(x)
        images = torch.from_numpy(np.stack(self.arrays)).to(self.device).permute(0, 3, 1, 2)
        return judged({"images": images, **self.learnt, **IMAGENET}, x, {})

    # --- The clock.

    def laps(self, stages: list[Callable[[Any], Any]], x: Any) -> list[float]:
        """ms of each stage, the device's work in it included."""
        times = []
        for stage in stages:
            begin = time.perf_counter()
            x = stage(x)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append((time.perf_counter() - begin) * 1e3)
        return times

    def run(self, head, seconds, keep_samples, progress) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        laps: dict[str, list[list[float]]] = {}
        for name in PIPELINES:
            progress(f"{head['case']}: check {name}")
            row = head | {"impl": name, "ms": None, "bytes": None, "flops": None, "roofline_share": None}
            rows.append(row)
            if error := self.why_wrong(name):  # which warms up, too
                row["error"] = error
                continue
            row["bus_bytes"] = self.pipeline(name)[0](self.arrays).nbytes
            laps[name] = []

        def sampler(name: str) -> Callable[[], float]:
            def sample() -> float:
                laps[name].append(self.laps(self.pipeline(name), self.arrays))
                return sum(laps[name][-1])

            return sample

        progress(f"{head['case']}: time")
        decode, *samples = rounds(
            [lambda: self.laps([lambda _: self.decode()], None)[0], *map(sampler, laps)], seconds, least=5
        )
        times = dict(zip(laps, samples, strict=True))
        for row in rows:
            if row["impl"] not in times:
                continue
            found = times[row["impl"]]
            row["ms"] = quantiles(found)
            row["images_per_s"] = rounded(len(self.files) / row["ms"]["median"] * 1e3)
            row["stages"] = {
                stage: rounded(statistics.median(each))
                for stage, each in zip(STAGES, zip(*laps[row["impl"]], strict=True), strict=True)
            }
            row["ms_with_decode"] = quantiles([t + d for t, d in zip(found, decode, strict=True)])
            if "float" in times:
                row["ratio"] = quantiles([t / f for t, f in zip(found, times["float"], strict=True)])
            if keep_samples:
                row["samples"] = found
        result: dict[str, Any] = {"rows": rows, "decode": quantiles(decode), "report": _report(rows, decode)}
        if wrong := [row for row in rows if "error" in row]:
            text = "; ".join(f"{row['impl']}: {row['error']}" for row in wrong)
            return result | {"verdict": f"Not compared: {text}.", "ok": False}
        both = list(zip(times["float"], times["uint8"], decode, strict=True))
        result["gain"] = quantiles([f / u for f, u, _ in both])
        result["gain_with_decode"] = quantiles([(f + d) / (u + d) for f, u, d in both])
        return result | {"verdict": _verdict(result, rows)}


def _report(rows: list[dict[str, Any]], decode: list[float]) -> str:
    lines = [f"decode, the same for all: {statistics.median(decode):.4g} ms"]
    for row in rows:
        if row["ms"]:
            stages = ", ".join(f"{stage.replace('_', ' ')} {ms:.4g}" for stage, ms in row["stages"].items())
            lines.append(
                f"{row['impl']} ({PIPELINES[row['impl']]}): {stages} ms; {row['bus_bytes'] / 1e6:.4g} MB to copy"
            )
    return "\n".join(lines)


def _verdict(result: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    floats, device, ours = rows
    decode = result["decode"]["median"]
    share = decode / (decode + ours["ms"]["median"])
    return (
        f"From decoded images to tokens, uint8 in one call against floats: {_measured(result['gain'])}, with "
        f"{floats['bus_bytes'] / ours['bus_bytes']:.0f} times fewer bytes to copy; against uint8 that is normalised on "
        f"the device: {device['ratio']['median'] / ours['ratio']['median']:.3f} x. Decoding takes {share:.0%} of the "
        f"way by uint8 in one process{', and dominates' * (share > 0.5)}: with it, "
        f"{_measured(result['gain_with_decode'])}."
    )


def _measured(gain: dict[str, float]) -> str:
    spread = f"{gain['median']:.3f} x, {gain['p20']:.3f} to {gain['p80']:.3f}"
    if gain["p20"] <= 1 <= gain["p80"]:
        return f"no gain to be measured ({spread})"
    return f"{'slower' if gain['median'] < 1 else 'faster'} ({spread})"
