"""Train a timm Vision Transformer whose front end is one fused call; uint8 images from the disk to the device.

    python examples/train.py                                            # scikit-learn's digits, 97 % on a CPU
    python examples/train.py --no-fuse --out unfused --compare train-output
    python examples/train.py --data ~/imagenet                          # train/<class>/*, val/<class>/*: as DeiT-S/16
    torchrun --nproc-per-node 8 examples/train.py --data ~/imagenet --parallel ddp     # or fsdp2
    python examples/train.py --task mae --out mae && python examples/train.py --init mae --out tuned

--out gets checkpoint.pt after every epoch, history.json and curve.png. The same command goes on where it was stopped,
killed or not, on any number of processes, and ends where it would have ended (on one CPU process, bit for bit); --fresh
starts over. The exit status is 2 for a wrong input, with one line that says which.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from data import Data, batches, load
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.data import Mixup
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer, init_weights_vit_timm
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, ParseKwargs, random_seed
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import vitkernels as vk
from vitkernels.cli import Parser, positive
from vitkernels.layers import to_patches

# Half as wide as tall: 8 patches of an 8 x 8 digit.
SMALL = {"patch_size": (4, 2), "embed_dim": 64, "depth": 4, "num_heads": 4, "weight_init": "jax"}
DIGITS = dict(model="vit_tiny_patch16_224", model_args=SMALL, img_size=8, epochs=60, warmup=3, batch=64, beta2=0.999)
DEIT = dict(
    model="vit_small_patch16_224", model_args={"drop_path_rate": 0.1}, img_size=224, epochs=300, warmup=5, batch=256,
    lr=2.5e-4, beta2=0.999,
)  # fmt: skip
MASKED = dict(model_args={}, epochs=800, warmup=40, lr=1.5e-4, beta2=0.95, decoder=(256, 4), mask_ratio=0.75)
# What is not named on the command line; lr is that of the batch given here, and grows with the batch.
RECIPES: dict[tuple[bool, str], dict[str, Any]] = {
    (True, "classify"): DIGITS | dict(lr=4e-3),
    (True, "mae"): DIGITS | dict(lr=4e-3, beta2=0.95, decoder=(64, 2), mask_ratio=0.5),
    (False, "classify"): DEIT,  # https://arxiv.org/abs/2012.12877
    (False, "mae"): DEIT | MASKED,  # https://arxiv.org/abs/2111.06377
}
# These may differ from one start of a training to the next.
OF_THE_PLACE = {
    "out", "device", "parallel", "accumulate", "workers", "compile", "fresh", "stop_after", "compare", "json",
}  # fmt: skip
LIMITS = dict(
    lr=10, weight_decay=10, beta2=1, warmup=10**6, clip=10**6, smoothing=1, mixup=100, cutmix=100, ema=1,
    workers=1000,
)  # fmt: skip
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)  # of all processes, on rank 0
INK, GREY, ACCENT = "#1f2430", "#667080", "#e4572e"


def options(argv: list[str] | None) -> Namespace:
    parser = Parser(prog="train.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data", default="digits", metavar="PATH", help="digits, or a folder of train/<class>/* and val/<class>/*")
    add("--task", choices=TASKS, default="classify")
    add("--out", type=Path, default=Path("train-output"), metavar="DIR", help="default: train-output")
    add("--init", type=Path, metavar="FILE", help="begin with the weights of this checkpoint, or folder of one")
    add("--model", help="of timm; default: a small one for digits, else vit_small_patch16_224")
    add("--model-args", nargs="*", action=ParseKwargs, metavar="KEY=VALUE", help="further arguments of the model")
    add("--img-size", type=positive, metavar="PIXELS")
    add("--no-fuse", dest="fuse", action="store_false", help="leave timm's own front end")
    add("--epochs", type=positive, metavar="N")
    add("--warmup", type=int, metavar="N", help="epochs in which lr rises; then it falls as a cosine")
    add("--batch", type=positive, metavar="N", help="images an update, of all processes together")
    add("--accumulate", type=positive, default=1, metavar="N", help="parts an update is computed in, for the memory")
    add("--lr", type=float, help="default: of the recipe, in proportion to the batch")
    add("--weight-decay", type=float, default=0.05, metavar="X", help="not of biases, norms, positions, tokens")
    add("--beta2", type=float, metavar="X", help="of AdamW")
    add("--clip", type=float, default=1.0, metavar="NORM", help="of the gradient; 0: don't")
    add("--smoothing", type=float, default=0.1, metavar="X", help="of labels")
    add("--mixup", type=float, default=0.0, metavar="ALPHA", help="DeiT: 0.8")
    add("--cutmix", type=float, default=0.0, metavar="ALPHA", help="DeiT: 1.0")
    add("--ema", type=float, default=0.0, metavar="DECAY", help="validate an average of the weights, such as 0.9999")
    add("--mask-ratio", type=float, metavar="X", help="of patches hidden from the encoder: 0.75, of digits 0.5")
    add("--decoder", type=positive, nargs=2, metavar=("WIDTH", "DEPTH"), help="for mae")
    add("--amp", choices=(*AMP, "none"), help="default: bf16 on a GPU, none on a CPU")
    add("--compile", action="store_true", help="with torch.compile")
    add("--parallel", choices=WRAP, help="default: ddp under torchrun, else none")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--workers", type=int, metavar="N", help="processes that load images; default: 0 for digits, else 8")
    add("--seed", type=int, default=0, metavar="N")
    add("--fresh", action="store_true", help="start over, where --out has a checkpoint")
    add("--stop-after", type=positive, metavar="EPOCH", help="for now; the schedule stays that of --epochs")
    add("--compare", type=Path, metavar="DIR", help="draw the curves of this --out as well")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args(argv)

    recipe = RECIPES[args.data == "digits", args.task]
    if args.lr is None:
        args.lr = recipe["lr"] * (args.batch or recipe["batch"]) / recipe["batch"]
    if args.model is not None and args.model_args is None:
        args.model_args = {}
    if args.warmup is None and args.epochs is not None:
        args.warmup = min(recipe["warmup"], args.epochs // 10)
    vars(args).update((name, value) for name, value in recipe.items() if getattr(args, name) is None)
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.amp is None:
        args.amp = "bf16" if args.device == "cuda" else "none"
    if args.workers is None:
        args.workers = 0 if args.data == "digits" else 8
    return args


@dataclass
class Run:
    args: Namespace
    data: Data
    device: torch.device
    rank: int
    world: int
    bare: nn.Module  # with parameters under their own names
    model: nn.Module  # what is called: the same, or DDP around it
    ema: ModelEmaV3 | None
    mixup: Mixup | None
    optimizer: torch.optim.Optimizer
    scheduler: CosineLRScheduler
    scaler: torch.amp.GradScaler
    front_end: dict[str, Any]  # "fused", and "front_end" in words
    console: Console
    history: list[dict[str, Any]] = field(default_factory=list)
    resumed: int = 0  # epochs that were there already

    @property
    def updates(self) -> int:
        """In an epoch; images that are too few for one more wait for another epoch's order."""
        return len(self.data.train) // self.args.batch

    def loader(self, epoch: int, train: bool) -> Any:
        return batches(
            self.data.train if train else self.data.val, self.args.batch // (self.world * self.args.accumulate),
            epoch=epoch, rank=self.rank, world=self.world, train=train,
            num_workers=self.args.workers, pin_memory=self.device.type == "cuda",
        )  # fmt: skip

    def autocast(self) -> Any:
        dtype = AMP.get(self.args.amp)
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()

    def summed(self, *values: Any) -> list[float]:
        """Over all processes."""
        sums = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values])
        if self.world > 1:
            dist.all_reduce(sums)
        return sums.tolist()


class MAE(nn.Module):
    """A masked autoencoder (https://arxiv.org/abs/2111.06377) around a timm encoder that embeds visible patches alone.

    forward(images [B,C,H,W] uint8, order [B,N]) -> losses [B]: the first `visible` patches of each order are seen, the
    others predicted, each normalised by its own mean and deviation.
    """

    def __init__(self, encoder: Any, visible: int, width: int, depth: int, data: Data, fuse: bool):
        super().__init__()
        N, K = encoder.patch_embed.num_patches, encoder.patch_embed.proj.weight[0].numel()
        self.encoder, self.visible, self.mean, self.std, self.fuse = encoder, visible, data.mean, data.std, fuse
        self.bridge = nn.Linear(encoder.embed_dim, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.decoder = nn.Sequential(*(Block(width, max(1, width // 32), qkv_bias=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, K)
        for part in (self.bridge, self.decoder, self.head):
            part.apply(init_weights_vit_timm)
        position = build_sincos2d_pos_embed(list(encoder.patch_embed.grid_size), width)
        self.register_buffer("position", position.view(N, width), persistent=False)

    def no_weight_decay(self) -> set[str]:
        return {"mask_token", *(f"encoder.{name}" for name in self.encoder.no_weight_decay())}

    def embed(self, images: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        e, proj = self.encoder, self.encoder.patch_embed.proj
        if self.fuse:
            return vk.patch_embed(
                images, proj.weight, proj.bias, pos_embed=e.pos_embed, prefix=e.cls_token, mean=self.mean, std=self.std,
                keep=keep, out_dtype=e.pos_embed.dtype,  # under autocast, too: timm's residual stream is fp32
            )  # fmt: skip
        position, seen = e.pos_embed, e.patch_embed(normalised(images, self.mean, self.std))
        seen = torch.take_along_dim(seen + position[:, 1:], keep[..., None], 1)
        return torch.cat([(e.cls_token + position[:, :1]).expand(len(images), -1, -1), seen], 1)

    def forward(self, images: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        e, hidden = self.encoder, order[:, self.visible :]
        x = e.norm_pre(e.pos_drop(self.embed(images, order[:, : self.visible])))
        x = self.bridge(e.fc_norm(e.norm(e.blocks(x))))
        # Attention does not mind the order of tokens, so it stays: class token, the seen, the hidden.
        patches = torch.cat([x[:, 1:], self.mask_token.expand(*hidden.shape, -1)], 1) + self.position[order]
        x = self.decoder(torch.cat([x[:, :1], patches], 1))
        predicted = self.head(self.norm(x[:, -hidden.shape[1] :]))
        pixels = torch.take_along_dim(to_patches(images, e.patch_embed.patch_size), hidden[..., None], 1) / 255
        target = F.layer_norm(pixels, pixels.shape[-1:], eps=1e-6)
        return (predicted.float() - target).square().mean((1, 2))


def normalised(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """uint8 pixels to fp32, where they lie."""
    mean, std = (255 * torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (mean, std))
    return (images - mean) / std


def classify(run: Run, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Losses [B], and which images [B] are right."""
    x, target = normalised(images, run.data.mean, run.data.std), labels
    if model.training and run.mixup:
        x, target = run.mixup(x, target)
    logits = model(x)
    smoothing = run.args.smoothing if model.training else 0.0
    return F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing), logits.argmax(1) == labels


def reconstruct(run: Run, model: nn.Module, images: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, None]:
    return model(images, order), None


TASKS: dict[str, Callable[..., Any]] = {"classify": classify, "mae": reconstruct}


def sharded(model: nn.Module, device: torch.device, world: int) -> nn.Module:
    mesh = init_device_mesh(device.type, (world,))
    for module in [*(m for m in model.modules() if isinstance(m, Block)), model]:
        fully_shard(module, mesh=mesh)
    return model


WRAP: dict[str, Callable[..., nn.Module]] = {
    "none": lambda model, device, world: model,
    "ddp": lambda model, device, world: DistributedDataParallel(
        model, [device] if device.type == "cuda" else None, broadcast_buffers=False
    ),
    "fsdp2": sharded,
}


def start(args: Namespace) -> Run:
    """Everything that is there before the first image. Raises ValueError, OSError and so on for wrong inputs."""
    rank, local, world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    launched = "WORLD_SIZE" in os.environ
    args.parallel = args.parallel or ("ddp" if launched else "none")
    if launched != (args.parallel != "none"):
        how = f"is for one process, torchrun started {world}" if launched else "needs torchrun --nproc-per-node N"
        raise ValueError(f"--parallel {args.parallel} {how}")
    parts = world * args.accumulate
    if args.batch % parts:
        raise ValueError(f"--batch {args.batch} is not divisible by {world} processes x --accumulate {args.accumulate}")
    if args.mixup + args.cutmix > 0 and args.batch // parts % 2:
        raise ValueError(f"mixup pairs images; --batch {args.batch} in {parts} parts has {args.batch // parts} in each")
    for name, most in LIMITS.items():
        if not 0 <= (value := getattr(args, name)) <= most:
            raise ValueError(f"--{name.replace('_', '-')} must be from 0 to {most}, got {value}")
    if args.warmup >= args.epochs:
        raise ValueError(f"--warmup {args.warmup} leaves nothing of --epochs {args.epochs}")
    if args.compare and not (args.compare / "history.json").is_file():
        raise FileNotFoundError(f"--compare {args.compare}: there is no {args.compare / 'history.json'}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no such device here")
    device = torch.device(args.device, local) if args.device == "cuda" else torch.device("cpu")

    data = load(args.data, args.img_size, args.seed)
    if args.batch > len(data.train):
        raise ValueError(f"--batch {args.batch} is more than the {len(data.train)} training images")
    bare, front_end = network(args, data)
    if args.task == "mae":
        data.train.patches = data.val.patches = bare.encoder.patch_embed.num_patches
    saved, file = None, args.out / "checkpoint.pt"
    if file.exists() and not args.fresh:
        saved, now = read(file), meaning(args)
        if differ := [k for k in now if now[k] != saved["args"].get(k)]:
            what = ", ".join(f"--{k.replace('_', '-')} {saved['args'].get(k)}, not {now[k]}" for k in differ)
            raise ValueError(f"{file} was made with {what}; --fresh starts over, --out chooses another folder")
    elif args.init:
        initialise(bare, args.init)
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.fresh:
            file.unlink(missing_ok=True)

    if launched:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    bare.to(device)
    ema = ModelEmaV3(bare, args.ema, use_warmup=True) if args.ema else None
    if ema and args.parallel == "fsdp2":
        sharded(ema.module, device, world)
    model = WRAP[args.parallel](bare, device, world)
    if args.compile:
        model.compile()
    optimizer = create_optimizer_v2(bare, "adamw", args.lr, args.weight_decay, betas=(0.9, args.beta2))
    updates = len(data.train) // args.batch
    scheduler = CosineLRScheduler(
        optimizer, args.epochs * updates, lr_min=args.lr / 100,
        warmup_t=args.warmup * updates, warmup_lr_init=args.lr / 1000, t_in_epochs=False,
    )  # fmt: skip
    mixes = args.task == "classify" and args.mixup + args.cutmix > 0
    run = Run(
        args, data, device, rank, world, bare, model, ema,
        Mixup(args.mixup, args.cutmix, label_smoothing=0.0, num_classes=data.classes) if mixes else None,
        optimizer, scheduler, torch.amp.GradScaler(device.type, enabled=args.amp == "fp16"), front_end,
        Console(stderr=args.json, quiet=rank > 0, highlight=False),
    )  # fmt: skip
    if saved:
        restore(run, saved)
    return run


def network(args: Namespace, data: Data) -> tuple[Any, dict[str, Any]]:
    """The model with the seed's random weights, fused or not, and what became of its front end."""
    if not timm.is_model(args.model):
        raise ValueError(f"timm has no model {args.model!r}; see timm.list_models('vit_*')")
    random_seed(args.seed)
    ending = {"num_classes": data.classes} if args.task == "classify" else {"num_classes": 0, "global_pool": ""}
    sizes = {"img_size": args.img_size, "in_chans": len(data.mean), **ending}
    model = timm.create_model(args.model, **{**sizes, **args.model_args})
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"this recipe takes timm's VisionTransformer; {args.model} is a {type(model).__name__}")
    (H, W), (P_h, P_w) = model.patch_embed.img_size, model.patch_embed.patch_size
    if H % P_h or W % P_w:
        rest = f"{H % P_h} rows and {W % P_w} columns are left over"
        raise ValueError(f"images of {H}x{W} pixels are no multiple of patches of {P_h}x{P_w}: {rest}")
    if args.task == "classify":
        found = vk.fuse(model)[0] if args.fuse else None
        note = f"{'fused' if found.fused else 'left alone'}: {found.note}" if found else "timm's own"
        return model, {"fused": bool(found and found.fused), "front_end": note}
    N = model.patch_embed.num_patches
    if model.cls_token is None or model.num_prefix_tokens != 1 or model.pos_embed.shape[1] != 1 + N:
        raise ValueError(f"--task mae takes a class token with a position and no registers, which {args.model} has not")
    visible = round(N * (1 - args.mask_ratio))
    if not 0 < visible < N:
        raise ValueError(f"--mask-ratio {args.mask_ratio} of {N} patches leaves {visible} visible")
    note = f"fused: {visible} visible patches of {N} alone" if args.fuse else "timm's own, then a choice of patches"
    return MAE(model, visible, *args.decoder, data, args.fuse), {"fused": args.fuse, "front_end": note}


def read(file: Path) -> dict[str, Any]:
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is no checkpoint: {type(error).__name__}") from error
    if not {"model", "args"} <= {*saved}:
        raise ValueError(f"{file} is no checkpoint of this program: it has {', '.join(map(str, saved))}")
    return saved


def initialise(model: nn.Module, file: Path) -> None:
    """Take the weights of a checkpoint, or of the encoder in one; a head for other classes stays as it is."""
    file = file / "checkpoint.pt" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"--init {file}: there is no such checkpoint")
    weights = read(file)["model"]
    encoder = {k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")} or weights
    own = model.state_dict()
    heads = ("head.", "norm.", "fc_norm.", "attn_pool.")  # the last norm goes with the pooling
    wanted = {k: v for k, v in own.items() if not k.startswith(heads) or (k in encoder and encoder[k].shape == v.shape)}
    for name, value in wanted.items():
        if name not in encoder or encoder[name].shape != value.shape:
            theirs = list(encoder[name].shape) if name in encoder else "missing"
            raise ValueError(f"--init {file}: {name} is {theirs}, the model's {list(value.shape)}")
    model.load_state_dict({name: encoder[name] for name in wanted}, strict=False)


def meaning(args: Namespace) -> dict[str, Any]:
    """The arguments that make two trainings the same one, as JSON has them."""
    words = {name: value for name, value in vars(args).items() if name not in OF_THE_PLACE}
    return json.loads(json.dumps(words, default=str))


def save(run: Run) -> None:
    """checkpoint.pt and history.json, from rank 0. All random numbers follow from seed and epoch: none are kept."""
    model, optimizer = dcp.get_state_dict(run.bare, run.optimizer, options=WHOLE)
    state = {
        "model": model,
        "optimizer": optimizer,
        "ema": dcp.get_model_state_dict(run.ema.module, options=WHOLE) if run.ema else None,
        "scheduler": run.scheduler.state_dict(),
        "scaler": run.scaler.state_dict(),
        "epoch": len(run.history),
        "history": run.history,
        "args": meaning(run.args),
    }
    if run.rank == 0:
        with replacing(run.args.out / "checkpoint.pt") as stream:
            torch.save(state, stream)
        with replacing(run.args.out / "history.json") as stream:
            stream.write(json.dumps(run.history, indent=1).encode())


@contextmanager
def replacing(file: Path) -> Iterator[Any]:
    """Write to a file which stays the old one until the new one is whole and on the disk."""
    part = file.with_name(file.name + ".part")
    with part.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, file)


def restore(run: Run, saved: dict[str, Any]) -> None:
    dcp.set_state_dict(
        run.bare, run.optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=WHOLE
    )
    if run.ema:
        dcp.set_model_state_dict(run.ema.module, saved["ema"], options=WHOLE)
    run.scheduler.load_state_dict(saved["scheduler"])
    run.scaler.load_state_dict(saved["scaler"])
    run.history, run.resumed = saved["history"], saved["epoch"]


@contextmanager
def reducing(model: nn.Module, last: bool) -> Iterator[None]:
    """Gradients travel between processes with the last part of an update, and not before."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
        yield


def train_epoch(run: Run, epoch: int, shown: Callable[..., None]) -> dict[str, float]:
    args, task, parts = run.args, TASKS[run.args.task], run.args.accumulate
    random_seed(hash((args.seed, epoch)) % 2**31, run.rank)
    run.model.train()
    began, total = time.perf_counter(), torch.zeros((), device=run.device)
    for i, batch in enumerate(islice(run.loader(epoch, train=True), run.updates * parts)):
        images, target = (t.to(run.device, non_blocking=True) for t in batch)
        update, part = divmod(i, parts)
        last = part == parts - 1
        if part == 0:
            run.scheduler.step_update(epoch * run.updates + update)
        with reducing(run.model, last):
            with run.autocast():
                loss = task(run, run.model, images, target)[0].mean() / parts
            run.scaler.scale(loss).backward()
        total += loss.detach()
        if not last:
            continue
        if args.clip:
            run.scaler.unscale_(run.optimizer)
            nn.utils.clip_grad_norm_(run.bare.parameters(), args.clip)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()
        if run.ema:
            run.ema.update(run.bare, step=epoch * run.updates + update + 1)
        rate = (update + 1) * args.batch / (time.perf_counter() - began)
        shown(epoch, update, rate, total)
    (loss,) = run.summed(total / run.updates / run.world)
    if not math.isfinite(loss):
        raise SystemExit(f"train.py: the loss is {loss} in epoch {epoch + 1}; a lower --lr than {args.lr} may help")
    lr = run.optimizer.param_groups[0]["lr"]
    return {"train_loss": loss, "lr": lr, "images_per_s": run.updates * args.batch / (time.perf_counter() - began)}


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """Of every validation image once: those that fill up the last batches of the processes don't count."""
    model = run.ema.module if run.ema else run.model
    model.eval()
    seen, loss, right, count = 0, 0.0, 0.0, 0.0
    for batch in run.loader(0, train=False):
        images, target = (t.to(run.device, non_blocking=True) for t in batch)
        places = torch.arange(seen, seen + len(images), device=run.device) * run.world + run.rank
        seen, real = seen + len(images), places < len(run.data.val)
        with run.autocast():
            losses, correct = TASKS[run.args.task](run, model, images, target)
        loss, count = loss + (losses * real).sum(dtype=torch.float64), count + real.sum()
        right = right if correct is None else right + (correct & real).sum()
    loss, right, count = run.summed(loss, right, count)
    accuracy = {"val_accuracy": right / count} if run.args.task == "classify" else {}
    return {"val_loss": loss / count, **accuracy, "val_images": int(count)}


def train(run: Run) -> dict[str, Any]:
    """All epochs that are missing; what --json prints."""
    args, console = run.args, run.console
    say = partial(console.print, soft_wrap=True)
    count = sum(p.numel() for p in run.bare.parameters())  # of DTensors, too, all of them
    say(
        f"{args.model}, {count / 1e6:.2f} M parameters, front end {run.front_end['front_end']}\n"
        f"{len(run.data.train)} images in {run.updates} updates an epoch on {run.world} x {run.device.type}, "
        f"amp {args.amp}; to {args.out}"
    )
    if run.resumed:
        say(f"resumed after epoch {run.resumed}")
    progress = Progress(
        TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"), console=console, transient=True,
        disable=not console.is_terminal or run.rank > 0,
    )  # fmt: skip
    bar = progress.add_task("", total=args.epochs * run.updates, epoch="", numbers="")

    def shown(epoch: int, update: int, rate: float, total: torch.Tensor) -> None:
        done = {"completed": epoch * run.updates + update + 1, "epoch": f"{epoch + 1}/{args.epochs}"}
        if update % 20 == 0 and not progress.disable:  # reading the loss waits for the GPU
            lr = run.optimizer.param_groups[0]["lr"]
            done["numbers"] = f"loss {total.item() / (update + 1):.3f}  lr {lr:.1e}  {rate:,.0f} images/s"
        progress.update(bar, **done)

    with progress:
        for epoch in range(run.resumed, min(args.epochs, args.stop_after or args.epochs)):
            began = time.perf_counter()
            row = {"epoch": epoch + 1, **train_epoch(run, epoch, shown), **evaluate(run)}
            row["seconds"] = time.perf_counter() - began
            run.history.append(row)
            save(run)
            accuracy = f", accuracy {row['val_accuracy']:.2%}" if "val_accuracy" in row else ""
            say(
                f"epoch {row['epoch']:>3}: loss {row['train_loss']:.4f}, validation {row['val_loss']:.4f}{accuracy}; "
                f"{row['images_per_s']:,.0f} images/s, {row['seconds']:.1f} s"
            )
    last, picture = run.history[-1], args.out / "curve.png"
    if run.rank == 0:
        folders = [folder.resolve() for folder in (args.out, args.compare) if folder]
        runs = [run.history, *(json.loads((other / "history.json").read_text()) for other in folders[1:])]
        alike = len({folder.name for folder in folders}) < len(folders)
        curves = {str(folder) if alike else folder.name: rows for folder, rows in zip(folders, runs, strict=True)}
        draw(curves, f"{args.task}: {args.model} on {Path(args.data).name}", picture)
        say(f"{args.out / 'checkpoint.pt'}, {args.out / 'history.json'}, {picture}")
    return {
        "task": args.task, "model": args.model, "parameters": count, **run.front_end,
        "device": str(run.device), "processes": run.world, "parallel": args.parallel, "resumed_after": run.resumed,
        **last, "seconds": sum(row["seconds"] for row in run.history), "out": str(args.out), "picture": str(picture),
    }  # fmt: skip


def draw(curves: dict[str, list[dict[str, float]]], title: str, path: Path) -> None:
    """Loss and accuracy against the epoch; a second run is a wide pale line below, so that equal ones both show."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    accuracy = all("val_accuracy" in row for rows in curves.values() for row in rows)
    figure = Figure(figsize=(11 if accuracy else 6.5, 4.6), dpi=120, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, weight="bold", color=INK)
    axes = figure.subplots(1, 1 + accuracy, squeeze=False)[0]
    styles = ({"lw": 1.6, "zorder": 3}, {"lw": 5, "alpha": 0.3, "zorder": 2, "solid_capstyle": "round"})
    for (name, rows), style in zip(curves.items(), styles, strict=False):
        epochs = [row["epoch"] for row in rows]
        point = "o" if len(rows) == 1 else None
        for key, colour, what in (("train_loss", GREY, "training, augmented"), ("val_loss", ACCENT, "validation")):
            values = [row[key] for row in rows]
            axes[0].plot(epochs, values, color=colour, marker=point, label=f"{name}, {what}: {values[-1]:.3f}", **style)
        if accuracy:
            values = [100 * row["val_accuracy"] for row in rows]
            axes[1].plot(epochs, values, color=ACCENT, marker=point, label=f"{name}: {values[-1]:.2f} %", **style)
    names = ("loss, nats an image", "validation accuracy, %") if accuracy else ("squared error of normalised pixels",)
    for ax, name in zip(axes, names, strict=True):
        ax.set_xlabel("epoch", color=GREY)
        ax.set_ylabel(name, color=GREY)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
        ax.legend(frameon=False, labelcolor=INK, fontsize=9)
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    args = options(argv)
    try:
        run = start(args)
    except (ValueError, TypeError, ImportError, OSError, RuntimeError, AssertionError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    try:
        result = train(run)
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if args.json and run.rank == 0:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    status = main()
    if "RANK" in os.environ:
        # A thread of gloo's may still hold the last collective's tensors, and aborts a process whose interpreter has
        # ended when it lets go of them (pytorch/pytorch#179291; 2 of 12 runs beside other work).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
