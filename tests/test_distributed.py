"""A fused model in two processes (gloo): the same as one process on the whole batch."""

import os
import time
import traceback
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import vitkernels as vk

vision_transformer = pytest.importorskip("timm.models.vision_transformer")

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
WORLD, STEPS, SECONDS = 2, 2, 300


def vit():
    return vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5
    )


def eva():
    module = pytest.importorskip("timm.models.eva")
    return module.Eva(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)


class Embeddings(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 32, 8, 8)
        self.table = torch.nn.Parameter(torch.empty(1, 16, 32))

    def forward(self, images):
        return self.conv(images).flatten(2).transpose(1, 2) + self.table


def embedding():
    return torch.nn.Sequential(Embeddings(), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(16 * 32, 5))


def projection():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 8, 8), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(512, 5)
    )


def rearranged():
    cut = pytest.importorskip("einops.layers.torch").Rearrange("b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=8, p2=8)
    front_end = torch.nn.Sequential(cut, torch.nn.Linear(192, 32))
    return torch.nn.Sequential(front_end, torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(16 * 32, 5))


class OfEachImage(torch.nn.Module):
    """A call with all that it may have, of tables of each image."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 32, 8, 8)
        self.table, self.prefix = (torch.nn.Parameter(torch.empty(8, n, 32)) for n in (17, 1))
        self.head = torch.nn.Linear(4 * 32, 5)

    def forward(self, images):
        keep = images[:, 0, 0, :16].argsort(1)[:, :3]
        tokens = vk.patch_embed(
            images, self.conv.weight, self.conv.bias, pos_embed=self.table, prefix=self.prefix, keep=keep,
            mean=(0.1, 0.2, 0.3), std=0.5,
        )  # fmt: skip
        return self.head(tokens.flatten(1))


def model(build=vit):
    torch.manual_seed(0)
    made = build()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.2)
    return made


def fuse(vit):
    assert [entry.fused for entry in vk.fuse(vit)] == [True]
    return vit


def freeze(vit):
    return vit.patch_embed.requires_grad_(False) and vit


def steps(vit, rank=0, world=1):
    """Train on this rank's part of every batch."""
    optimiser = torch.optim.SGD([p for p in vit.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for step in range(STEPS):
        g = torch.Generator().manual_seed(step)
        images, labels = torch.randn(8, 3, 32, 32, generator=g), torch.randint(5, (8,), generator=g)
        optimiser.zero_grad()
        y = vit(images.chunk(world)[rank])
        torch.nn.functional.cross_entropy(y.float(), labels.chunk(world)[rank]).backward()
        optimiser.step()
    return vit


def result(vit):
    return {n: t.detach().clone() for n, t in vit.state_dict().items()}


def assert_moved_alike(found, expected, start, tolerance):
    assert found.keys() == expected.keys() == start.keys()
    for name, before in start.items():
        moved, error = (expected[name] - before).norm(), (found[name] - expected[name]).norm()
        assert error <= tolerance * moved, f"{name} is off by {error:.3g}, having moved by {moved:.3g}"


class Calls(TorchDispatchMode):
    """Counts the calls of the registered operation."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.vitkernels.patch_embed.default
        return func(*args, **(kwargs or {}))


def ddp(rank, build, when, frozen, options):
    vit = freeze(model(build)) if frozen else model(build)
    if when == "before":
        fuse(vit)
    wrapped = DistributedDataParallel(vit, **options)
    if when == "after":
        fuse(wrapped)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[sS]trides do not match bucket view")
        steps(wrapped, rank, WORLD)
    calls = Calls()
    with calls, torch.no_grad():
        vit(torch.randn(1, 3, 32, 32))
    assert calls.count == 1  # still fused
    return result(vit)


def fsdp(rank, build, when, reshard, policy):
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    vit = model(build)
    if when == "before":
        fuse(vit)
    kwargs = dict(mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    for block in getattr(vit, "blocks", ()):
        fully_shard(block, **kwargs)
    fully_shard(vit, **kwargs)
    if when == "after":
        fuse(vit)
    calls = Calls()
    with calls:
        steps(vit, rank, WORLD)
    assert calls.count == STEPS
    if when == "before" and hasattr(vit, "_vk_mixin"):
        with pytest.raises(RuntimeError, match="FSDP"):  # it swapped the class since
            vk.unfuse(vit)
    full = get_model_state_dict(vit, options=StateDictOptions(full_state_dict=True))
    return {n: t.clone() for n, t in full.items()}


def dtensor(rank, build, when, placement, cut):
    """Of images placed so; with `cut` the front end's parameters are cut along their last dimension."""
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    vit = model(build)
    if when == "before":
        fuse(vit)

    def place(_, module, mesh):
        for name, p in module.named_parameters(recurse=False):
            where = Replicate() if isinstance(module, torch.nn.Linear) else Shard(p.ndim - 1)
            module.register_parameter(name, torch.nn.Parameter(distribute_tensor(p, mesh, [where])))

    def whole(module, y, mesh):
        assert y.placements == (placement,)
        return y.full_tensor()

    distribute_module(
        vit, mesh, place if cut else None, output_fn=whole,
        input_fn=lambda _, images, mesh: (distribute_tensor(*images, mesh, [placement]),),
    )  # fmt: skip
    if when == "after":
        fuse(vit)
    calls = Calls()
    with calls:
        steps(vit)
    assert calls.count == STEPS
    return {n: t.full_tensor() for n, t in vit.state_dict().items()}


# name -> what runs in both processes, its arguments, the model first, and how near it comes to one process
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
DDP = {
    "plain": {},
    "bucket views": dict(gradient_as_bucket_view=True),
    "static graph": dict(static_graph=True, gradient_as_bucket_view=True),
    "unused parameters": dict(find_unused_parameters=True),
}
RUNS = {
    **{
        f"DDP, {name}, fused {when}{', frozen' * frozen}": (ddp, (vit, when, frozen, options), 1e-3)
        for name, options in DDP.items()
        for when in ("before", "after")
        for frozen in (False, True)
    },
    **{
        f"FSDP2, {name}, fused {when}, {'' if reshard else 'not '}resharded": (
            fsdp,
            (vit, when, reshard, policy),
            tolerance,
        )
        for name, policy, tolerance in (("fp32", MixedPrecisionPolicy(), 1e-3), ("bf16", BF16, 0.1))
        for when in ("before", "after")
        for reshard in (True, False)
    },
    **{
        f"{name}, {build.__name__}": (work, (build, when, *options), 1e-3)
        for name, work, when, options in (
            ("DDP", ddp, "before", (False, {})),
            ("FSDP2, fused before", fsdp, "before", (True, MixedPrecisionPolicy())),
            ("FSDP2, fused after", fsdp, "after", (True, MixedPrecisionPolicy())),
        )
        for build in (eva, embedding, projection, rearranged)
    },
    **{
        f"DTensor, {placement}{', cut' * cut}, fused {when}, {build.__name__}": (
            dtensor,
            (build, when, placement, cut),
            1e-3,
        )
        for placement in (Replicate(), Shard(0))
        for build, when, cut in (
            (embedding, "before", False),
            (embedding, "after", False),
            (embedding, "after", True),
            (projection, "before", True),
            (rearranged, "before", False),
            (OfEachImage, "never", False),
            (OfEachImage, "never", True),
        )
    },
}


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    for i, (work, args, _) in enumerate(RUNS.values()):
        try:
            found = work(rank, *args)
        except Exception:
            found = traceback.format_exc()
        torch.save(found, folder / f"{i}.{rank}")
    dist.destroy_process_group()
    os._exit(0)  # as examples/train.py does, and why it says


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory):
    """Folder with what each of RUNS gave; one start of two processes for all."""
    folder = tmp_path_factory.mktemp("distributed")
    context = mp.spawn(process, (folder,), WORLD, join=False)
    end = time.monotonic() + SECONDS
    try:
        while not context.join(end - time.monotonic()):
            assert time.monotonic() < end, f"not done after {SECONDS} s"
    finally:
        for child in context.processes:
            if child.is_alive():
                child.kill()
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_as_one_process(name, in_two_processes):
    _, (build, *_), tolerance = RUNS[name]
    found = [torch.load(in_two_processes / f"{list(RUNS).index(name)}.{rank}") for rank in range(WORLD)]
    for each in found:
        assert isinstance(each, dict), each
    expected = result(steps(freeze(model(build)) if "frozen" in name else model(build)))
    for ours in filter(None, found):  # FSDP's full state is on rank 0 alone, unless it is broadcast
        assert_moved_alike(ours, expected, model(build).state_dict(), tolerance)
        model(build).load_state_dict(ours, strict=True)
    assert found[0]
