"""Writes the tables of docs/scale.md and docs/gpus.md, between their markers, and docs/scale.png, by arithmetic.

python benchmarks/scale.py            # both
python benchmarks/scale.py --check    # exit status 1 if a table is not what the model says now
"""

from __future__ import annotations

import argparse
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from suites import TARGETS
from torch._subclasses.fake_tensor import FakeTensorMode

import vitkernels as vk
from vitkernels.backends.cuda import forward_plan
from vitkernels.backends.triton.forward_plan import make_plan
from vitkernels.bench.implementations import problem
from vitkernels.cost_model import Roofline
from vitkernels.cost_model.data_sheets import GPUS
from vitkernels.cost_model.traffic import Algorithm
from vitkernels.gpu import NOMINAL

DOCS = Path(__file__).resolve().parents[1] / "docs"

# Assumptions. docs/scale.md states each of them.
MFU = 0.4  # of the peak rate, in training; forward and backward are three forwards
LAUNCH_US = 5  # least time of one kernel, replayed from a CUDA graph
CALL_US = 50  # an eager call's Python and dispatch
JPEG_KB = 110  # of an ImageNet photograph
CORE_MS = 5  # of one core to decode, crop and resize one
NIC_GB_S = 50  # a GPU's share of the network: 400 Gb/s
FLEETS = (8, 64, 1024, 8192)
GRAD_BYTES = 4
# docs/gpus.md: what an H200 did of the plan's unit of work in a microsecond (93 µs for the 9 tiles a multiprocessor of
# ViT-B/16, B = 256); of a tile's time with one warpgroup behind the other; a launch and the first stage; bytes in a µs
PER_US, BEHIND, FIRST_US, PACKED = 9 * 768 * 128 * 256 / 93, 0.94, 2, 4e6


class Model(NamedTuple):
    name: str
    D: int
    depth: int
    P: int

    def tokens(self, side: int, keep: float = 1.0) -> int:
        return 1 + round((side // self.P) ** 2 * keep)

    def blocks(self, side: int, keep: float = 1.0) -> int:
        """Multiply-adds of the transformer for one image: 12·D² a token and block, and attention's 2·L²·D."""
        L = self.tokens(side, keep)
        return self.depth * (12 * self.D**2 * L + 2 * L**2 * self.D)

    def front(self, side: int, keep: float = 1.0) -> int:
        return round((side // self.P) ** 2 * keep) * 3 * self.P**2 * self.D

    def share(self, side: int, keep: float = 1.0) -> float:
        return self.front(side, keep) / (self.front(side, keep) + self.blocks(side, keep))

    def flops(self, side: int) -> int:
        """Of one image's training step."""
        return 3 * 2 * (self.front(side) + self.blocks(side))

    def front_parameters(self, side: int) -> int:
        return self.D * (3 * self.P**2 + 1 + 1 + self.tokens(side))  # weight, bias, class token, positions

    def parameters(self, side: int) -> int:
        return self.front_parameters(side) + self.depth * 12 * self.D**2


MODELS = {
    model.name: model
    for model in (
        Model("ViT-Ti/16", 192, 12, 16), Model("ViT-S/16", 384, 12, 16), Model("ViT-B/16", 768, 12, 16),
        Model("ViT-L/14", 1024, 24, 14), Model("ViT-H/14", 1280, 32, 14), Model("ViT-g/14", 1536, 40, 14),
    )
}  # fmt: skip
NORM = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@lru_cache(maxsize=4096)
def roofline(model: Model, B: int, side: int = 224, pixels: str = "uint8", keep: int | None = None, mode="forward",
             gpus: tuple[str, ...] | None = None) -> Roofline:  # fmt: skip
    """Of a model's front end in bf16; nothing is allocated."""
    dtype = {"uint8": torch.uint8, "bf16": torch.bfloat16, "fp32": torch.float32}[pixels]

    def meta(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    D, P, L = model.D, model.P, model.tokens(side)
    explained = vk.explain(
        meta(B, 3, side, side, dtype=dtype), meta(D, 3, P, P), meta(D), pos_embed=meta(L, D), prefix=meta(1, D),
        keep=None if keep is None else meta(B, keep, dtype=torch.int64), **(NORM if pixels == "uint8" else {}),
    )  # fmt: skip
    return vk.roofline(explained, mode, gpus)


def fused(r: Roofline, gpu: str) -> tuple[str, Algorithm]:
    """What `auto` would take on a GPU: the first of Triton's."""
    return next((name, moved) for name, moved in r.roads[gpu].items() if name.startswith("triton"))


def table(head: str, rows: list[list[str]]) -> str:
    columns = head.count("|") + 1
    return "\n".join([f"| {head} |", "|" + " --- |" * columns, *("| " + " | ".join(row) + " |" for row in rows)])


def n(value: float) -> str:
    """Three digits, and commas."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def percent(value: float) -> str:
    return f"{100 * value:.2f} %" if value < 0.1 else f"{100 * value:.1f} %"


def sheets() -> str:
    rows = [
        [s.name, n(s.half), n(s.tf32), n(s.fp32), n(s.fp64), n(s.memory_gb_s), f"{s.ridge('half'):.0f}", n(s.l2_mb),
         n(s.multiprocessors), n(s.host_gb_s), f"{s.source}{'. *' + s.unchecked + '*' if s.unchecked else ''}"]
        for s in GPUS.values()
    ]  # fmt: skip
    return table("GPU | bf16 TFLOP/s | tf32 | fp32 | fp64 | memory GB/s | ridge, FLOP/B | L2 MB | SMs | host GB/s | "
                 "source", rows)  # fmt: skip


def share() -> str:
    sides = {16: (224, 384, 512, 1024, 2048), 14: (224, 378, 518, 1022, 2044)}
    rows = [[m.name, *(percent(m.share(side)) for side in sides[m.P])] for m in MODELS.values()]
    rows += [[f"attention's L² part, {m.name}", *(percent(_attention(m, side)) for side in sides[m.P])]
             for m in (MODELS["ViT-Ti/16"], MODELS["ViT-L/14"])]  # fmt: skip
    return table("front end's multiply-adds | 224 | 384 (P = 14: 378) | 512 (518) | 1024 (1022) | 2048 (2044)", rows)


def _attention(m: Model, side: int) -> float:
    L = m.tokens(side)
    return m.depth * 2 * L**2 * m.D / (m.front(side) + m.blocks(side))


def algorithms() -> str:
    r, gpu = roofline(MODELS["ViT-B/16"], 256, gpus=("H100 SXM",)), "H100 SXM"
    sheet, rows = r.sheets[gpu], []
    for name in (fused(r, gpu)[0], "reshape_linear", "timm_eager"):
        moved = r.roads[gpu][name]
        for p in moved.passes:
            ms = max(p.bytes / sheet.bytes, p.flops / sheet.flops(r.product)) * 1e6
            inside = f" (inside the {p.inside})" if p.inside else ""
            rows.append([name, p.name + inside, n(p.read / 1e6), n(p.written / 1e6), f"{ms:.0f}"])
        rows.append([f"**{name}**", "**all**", f"**{n(moved.read / 1e6)}**", f"**{n(moved.written / 1e6)}**",
                     f"**{r.road_ms(gpu, name) * 1e3:.0f}**"])  # fmt: skip
    return table("way | pass | MB read | MB written | µs", rows)


def steps() -> str:
    gpu, B, rows = "H100 SXM", 256, []
    for m, side in [(m, 224) for m in MODELS.values()] + [(MODELS["ViT-L/14"], 518), (MODELS["ViT-L/14"], 1022)]:
        r = roofline(m, B, side, mode="both", gpus=(gpu,))
        whole = B * m.flops(side) / (MFU * GPUS[gpu].half * 1e12) * 1e3
        ours, eager = (r.road_ms(gpu, name) for name in (fused(r, gpu)[0], "timm_eager"))
        rows.append([m.name, str(side), n(whole), f"{eager:.2f}", f"{ours:.2f}", percent((eager - ours) / whole)])
    return table("model | pixels | a training step, ms | front end eager, ms | fused, ms | the most a step gains", rows)


def batches() -> str:
    m, rows = MODELS["ViT-B/16"], []
    for gpu, sheet in GPUS.items():
        row = [gpu]
        for what in (LAUNCH_US, CALL_US):
            row.append(n(_first(lambda B, g=gpu, w=what: roofline(m, B, gpus=(g,)).gpus[g].ms * 1e3 >= w)))
        bound = _first(lambda B, g=gpu: roofline(m, B, gpus=(g,)).gpus[g].bound == "arithmetic")
        row.append(n(bound) if bound else "never")
        for B in (1, 32, 256):
            plan = make_plan(roofline(m, B, gpus=(gpu,)).problem, sheet.planned, True, False)
            waves = plan.grid / sheet.multiprocessors
            full = waves / -(-plan.grid // sheet.multiprocessors)
            row.append(f"{plan.config.BM}×{plan.config.BN}: {plan.grid} = {waves:.2f} waves, {100 * full:.0f} % full")
        rows.append(row)
    return table(f"GPU | over {LAUNCH_US} µs from B = | over {CALL_US} µs from B = | arithmetic bounds from B = | "
                 "programs at B = 1 | at 32 | at 256", rows)  # fmt: skip


def _first(holds) -> int:
    """The first batch for which it holds, up to 4096; 0: none."""
    low, high = 0, 1
    while not holds(high):
        low, high = high, 2 * high
        if high > 4096:
            return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def rate(m: Model, side: int = 224, gpu: str = "H100 SXM") -> float:
    """Images a second of one GPU in training."""
    return MFU * GPUS[gpu].half * 1e12 / m.flops(side)


def inputs() -> str:
    rows, host = [], GPUS["H100 SXM"].host_gb_s
    for m in MODELS.values():
        images = rate(m)
        gb = [images * 3 * 224**2 * size / 1e9 for size in (1, 2, 4)]
        rows.append([m.name, n(images), *(f"{n(v)} ({percent(v / host)})" for v in gb)])
    return table("model, 224 px, one H100 | images/s | uint8, GB/s (of the host link) | bf16 | fp32", rows)


def fleet() -> str:
    rows = []
    for m in (MODELS["ViT-S/16"], MODELS["ViT-B/16"], MODELS["ViT-L/14"], MODELS["ViT-g/14"]):
        for gpus in FLEETS:
            images = gpus * rate(m)
            rows.append([
                m.name, n(gpus), n(images), n(images * JPEG_KB * 1e3 / 1e9), n(images * 3 * 224**2 / 1e9),
                n(4 * images * 3 * 224**2 / 1e9), n(images * CORE_MS / 1e3),
            ])  # fmt: skip
    return table("model | H100s | images/s | JPEG from storage, GB/s | to the GPUs as uint8, GB/s | as fp32 | "
                 "CPU cores", rows)  # fmt: skip


def allreduce() -> str:
    rows, link, nodes = [], GPUS["H100 SXM"].peer_gb_s, 1024
    for m in MODELS.values():
        front, whole = (GRAD_BYTES * k for k in (m.front_parameters(224), m.parameters(224)))
        ring = [2 * (g - 1) / g * front / speed for g, speed in ((8, link * 1e9), (nodes, NIC_GB_S * 1e9))]
        all_of_it = 2 * (nodes - 1) / nodes * whole / (NIC_GB_S * 1e9)
        sharded = 3 * (nodes - 1) / nodes * front
        rows.append([m.name, n(front / 1e6), n(whole / 1e6), percent(front / whole), n(ring[0] * 1e6), n(ring[1] * 1e6),
                     n(all_of_it * 1e3), n(sharded / 1e6)])  # fmt: skip
    return table("model, 224 px | front end, MB | model, MB | share | DDP: front end, 8 GPUs, µs | 1,024 GPUs, µs | "
                 "whole model, 1,024, ms | FSDP2: front end, MB a GPU and step", rows)  # fmt: skip


def memory() -> str:
    rows, gpu = [], "H100 SXM"
    for m, pixels in ((MODELS["ViT-B/16"], "uint8"), (MODELS["ViT-B/16"], "bf16"), (MODELS["ViT-L/14"], "uint8")):
        r = roofline(m, 256, pixels=pixels, gpus=(gpu,))
        back = roofline(m, 256, pixels=pixels, mode="backward", gpus=(gpu,))
        found = r.roads[gpu]
        parts = sum(p.written for p in fused(back, gpu)[1].passes[:-1]) / 1e6
        images = r.works[0].bytes["images"] / 1e6
        rows.append([f"{m.name}, B = 256, {pixels}", n(images), n(found["timm_eager"].kept / 1e6),
                     n(found["reshape_linear"].kept / 1e6), n(fused(r, gpu)[1].kept / 1e6), n(parts)])  # fmt: skip
    return table("case | images themselves, MB | kept beside them: eager | reshape + linear | fused | fused backward's "
                 "parts, while it runs", rows)  # fmt: skip


def mae() -> str:
    rows, gpu = [], "H100 SXM"
    for m in MODELS.values():
        N = (224 // m.P) ** 2
        r = roofline(m, 256, keep=N // 4, gpus=(gpu,))
        every = m.front(224) / (m.front(224) + m.blocks(224, 0.25))
        names = ("embed_all_then_gather", "reshape_linear", fused(r, gpu)[0])
        rows.append([m.name, percent(every), percent(m.share(224, 0.25)),
                     *(f"{n(r.roads[gpu][k].bytes / 1e6)} MB, {r.road_ms(gpu, k) * 1e3:.0f} µs"
                       for k in names)])  # fmt: skip
    return table("encoder on 25 % of the patches | front end of it, all embedded | only the kept | embed all, gather | "
                 "gather, linear | fused", rows)  # fmt: skip


def requests() -> str:
    rows, gpu = [], "H100 SXM"
    r = roofline(MODELS["ViT-B/16"], 256, gpus=(gpu,))
    for name in ("triton descriptor", "triton gather", "cuda engine", "cuda copy"):
        moved = r.roads[gpu][name]
        asked = moved.requested / 1e6
        tile = re.search(r"tiles of ([\d×]+)", moved.note)[1]
        rate_ = asked / r.road_ms(gpu, name) / 1e3
        rows.append([name, tile, n(moved.bytes / 1e6), n(asked), f"{rate_:.1f}"])
    return table("algorithm on an H100, ViT-B/16, B = 256, uint8 | tile | memory, MB | asked of L2, MB | TB/s, to "
                 "take no longer than the arithmetic", rows)  # fmt: skip


def limits() -> str:
    rows = []
    for m, side in ((MODELS["ViT-B/16"], 224), (MODELS["ViT-L/14"], 518), (MODELS["ViT-S/16"], 2048)):
        N = (side // m.P) ** 2
        most = (2**31 - 2**17) // N
        rows.append([f"{m.name}, {side} px", n(N), n(most), n(most * 3 * side**2 / 1e12)])
    return table("case | N | largest B | uint8 pixels of that, TB", rows)


TABLES = {
    "sheets": sheets, "share": share, "algorithms": algorithms, "steps": steps, "batches": batches,
    "requests": requests, "inputs": inputs, "fleet": fleet, "allreduce": allreduce, "memory": memory, "mae": mae,
    "limits": limits,
}  # fmt: skip


def expected() -> str:
    """Of the CUDA C++ forward on an H200, case by case, by its plan's own arithmetic."""
    rows = []
    for case, mode, us, products in TARGETS:
        if mode != "forward":
            continue
        with FakeTensorMode():
            p = problem(case.call("cpu"))
        f = forward_plan.make_plan(p, NOMINAL[90], case.dtype == "tf32")
        found = f.cost / PER_US * (BEHIND if f.lag else 1) + FIRST_US + f.pack * (FIRST_US + f.scratch_bytes / PACKED)
        rows.append([case.name, f.how, n(found), n(us) if us else f"{products} × the library's product"])
    return table("case | kernel | expected, µs | asked, µs", rows)


PAGES = {"scale.md": TABLES, "gpus.md": {"expected": expected}}


def written(page: str, text: str) -> str:
    """The page with every table as the model has it now."""
    for name, make in PAGES[page].items():
        marker = re.compile(rf"(<!-- scale: {name}[^\n]*-->\n).*?(<!-- /scale -->)", re.S)
        if not marker.search(text):
            raise SystemExit(f"docs/{page} has no place for the table {name!r}")
        body = make() + "\n"
        text = marker.sub(lambda found, body=body: found[1] + body + found[2], text)
    return text


def figure(file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "scale"})
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), dpi=110, layout="constrained")
    batch, colours = [2**i for i in range(11)], plt.get_cmap("viridis")
    lines = {"H200": (0, (3, 2))}  # the H100's line but for its memory, which does not bound here
    for i, gpu in enumerate(GPUS):
        us = [max(LAUNCH_US, roofline(MODELS["ViT-B/16"], B, gpus=(gpu,)).gpus[gpu].ms * 1e3) / B for B in batch]
        colour = plt.get_cmap("tab10")(i)
        left.plot(batch, us, color=colour, ls=lines.get(gpu, "-"), marker="o", markersize=2.5, lw=1.3, label=gpu)
    left.plot(batch, [LAUNCH_US / B for B in batch], color="grey", ls=":", lw=1, label=f"one launch of {LAUNCH_US} µs")
    left.set(xscale="log", yscale="log", xlabel="images in a batch", ylabel="least µs an image",
             title="ViT-B/16, 224 px, uint8 to bf16")  # fmt: skip
    left.set_yticks([0.01, 0.1, 1, 5], [0.01, 0.1, 1, 5])
    left.set_xticks([1, 4, 16, 64, 256, 1024], [1, 4, 16, 64, 256, 1024])
    left.minorticks_off()
    left.legend(frameon=False, fontsize=7, ncols=2)
    for i, m in enumerate(MODELS.values()):
        sides = [side // m.P * m.P for side in (224, 288, 384, 512, 768, 1024, 1536, 2048)]
        right.plot(sides, [100 * m.share(side) for side in sides], color=colours(i / (len(MODELS) - 0.5)), marker="o",
                   markersize=2.5, lw=1.2, label=m.name)  # fmt: skip
    right.set(xscale="log", yscale="log", xlabel="pixels of a side", ylabel="% of the model's multiply-adds",
              title="The front end's share")  # fmt: skip
    right.set_xticks([224, 384, 512, 1024, 2048], [224, 384, 512, 1024, 2048])
    right.set_yticks([0.03, 0.1, 0.3, 1, 2], [0.03, 0.1, 0.3, 1, 2])
    right.minorticks_off()
    right.legend(frameon=False, fontsize=7)
    fig.savefig(file, metadata={"Software": None})
    plt.close(fig)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a table is stale")
    args = parser.parse_args()
    stale = []
    for page in PAGES:
        text = (DOCS / page).read_text()
        now = written(page, text)
        stale += [f"docs/{page}"] * (now != text)
        if not args.check:
            (DOCS / page).write_text(now)
    if args.check:
        for page in stale:
            print(f"{page} is stale: python benchmarks/scale.py writes it", file=sys.stderr)
        return int(stale != [])
    figure(DOCS / "scale.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
