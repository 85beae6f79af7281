"""The one noun: a patch-embedding problem, its sizes, dtypes and strides, and every check of the inputs.

Letters, here and in every other file:
  B C F H W     images, channels, frames (1 for a picture), height, width
  P S pad       patch size, stride and padding, each (t, y, x); a picture has P_t = S_t = 1
  G N           patch grid (t, y, x); N = G_t·G_h·G_w patches of one image
  K             C·P_t·P_h·P_w, the length of one flattened patch in Conv weight order (c, t, y, x)
  D T           embedding width; prefix tokens in front of the patches
  M             B·N, or B·N_keep: all patches of a call, the rows of the product M × K · K × D
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from numbers import Real
from operator import index
from typing import Any, NamedTuple

import torch

IMAGE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOAT_DTYPES = IMAGE_DTYPES[1:]
KEEP_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)

Triple = tuple[int, int, int]


class Meta(NamedTuple):
    """What a check may look at: never the data."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Layout(NamedTuple):
    """How a tensor lies."""

    dtype: torch.dtype
    strides: tuple[int, ...]  # canonical (`canonical`), in elements; 0 between images where all share a table


class Arguments(NamedTuple):
    """The non-tensor arguments of the call, checked as far as they can be without the images."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    scale: float
    compute_dtype: torch.dtype
    out_dtype: torch.dtype


@dataclass(frozen=True, eq=False, kw_only=True)
class PatchProblem:
    """Everything a backend needs to know before it sees data.

    `problem_of` caches problems, so the same metadata gives the same object: a problem hashes by identity,
    which keeps the tables keyed by it (backend choice, launch plans) cheap.
    """

    B: int
    C: int
    F: int
    H: int
    W: int
    P: Triple
    S: Triple
    pad: Triple
    D: int
    T: int
    n_keep: int | None
    video: bool
    tensors: tuple[Layout | None, ...]  # of images, weight, bias, pos_embed, prefix and keep
    has_bias: bool
    pos_rows: int  # 0, N or T + N
    pos_per_image: bool
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    scale: float
    image_dtype: torch.dtype
    weight_dtype: torch.dtype
    compute_dtype: torch.dtype  # of the product's operands; it is summed in fp32 (fp64 for fp64)
    out_dtype: torch.dtype
    device: torch.device

    @property
    def image_strides(self) -> tuple[int, ...]:
        """Of [B, C, F, H, W]."""
        assert self.tensors[0] is not None
        return self.tensors[0].strides

    @property
    def weight_strides(self) -> tuple[int, ...]:
        """Of [D, C, P_t, P_h, P_w]."""
        assert self.tensors[1] is not None
        return self.tensors[1].strides

    @cached_property
    def G(self) -> Triple:
        t, y, x = grid_of((self.F, self.H, self.W), self.pad, self.P, self.S)
        return t, y, x

    @cached_property
    def N(self) -> int:
        return self.G[0] * self.G[1] * self.G[2]

    @cached_property
    def rows(self) -> int:
        """Patches embedded of each image: N, or N_keep of them."""
        return self.N if self.n_keep is None else self.n_keep

    @cached_property
    def K(self) -> int:
        return self.C * self.P[0] * self.P[1] * self.P[2]

    @cached_property
    def out_shape(self) -> tuple[int, int, int]:
        return self.B, self.T + self.rows, self.D

    @cached_property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @cached_property
    def sum_dtype(self) -> torch.dtype:
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32

    @cached_property
    def normalised(self) -> bool:
        """Whether channels differ: then y = x·a[c] + b[c], otherwise y = x·scale."""
        return self.mean is not None or self.std is not None

    @cached_property
    def affine(self) -> tuple[list[float], list[float]]:
        """a, b with (x·scale − mean)/std = x·a + b, a value per channel."""
        mean, std = self.mean or (0.0,) * self.C, self.std or (1.0,) * self.C
        return [self.scale / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]

    @cached_property
    def centred(self) -> tuple[list[float], list[float]]:
        """m, a with (x·scale − mean)/std = (x − m)·a per channel; unlike x·a + b it loses nothing near the mean."""
        a, b = self.affine
        return [-y / x for x, y in zip(a, b, strict=True)], a

    @property
    def flops(self) -> int:
        return 2 * self.B * self.rows * self.K * self.D

    @property
    def bytes(self) -> int:
        """Compulsory traffic: every pixel that is needed, the weight and every token once."""
        pixels = self.B * self.C * self.F * self.H * self.W
        if self.n_keep is not None:
            pixels = min(pixels, self.B * self.n_keep * self.K)
        out = math.prod(self.out_shape)
        return (
            pixels * self.image_dtype.itemsize
            + self.D * self.K * self.weight_dtype.itemsize
            + out * self.out_dtype.itemsize
        )

    def __str__(self) -> str:
        name = {dtype: str(dtype).removeprefix("torch.") for dtype in (self.image_dtype, self.out_dtype)}
        picture = f"{self.F}x{self.H}x{self.W}" if self.video else f"{self.H}x{self.W}"
        patch = "x".join(map(str, self.P if self.video else self.P[1:]))
        return (
            f"B={self.B} C={self.C} {picture} patch {patch} D={self.D} T={self.T} "
            f"{name[self.image_dtype]} -> {name[self.out_dtype]}"
        )


def grid_of(
    sizes: Sequence[int], padding: Sequence[int], patch: Sequence[int], stride: Sequence[int]
) -> tuple[int, ...]:
    """How many patches fit along each axis; none or fewer where the patch does not."""
    axes = zip(sizes, padding, patch, stride, strict=True)
    return tuple((size + 2 * pad - P) // S + 1 for size, pad, P, S in axes)


def arguments_of(
    images: Any,
    weight: Any,
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    mean: Any,
    std: Any,
    scale: float | None,
    out_dtype: torch.dtype | None,
) -> Arguments:
    """Give the non-tensor arguments their defaults and one form each."""
    _tensor("images", images, IMAGE_DTYPES)
    _tensor("weight", weight, FLOAT_DTYPES)
    if weight.ndim not in (4, 5):
        raise ValueError(f"weight must be [D,C,P_h,P_w] or [D,C,P_t,P_h,P_w], got {_shape(weight)}")
    patch = tuple(weight.shape[2:])
    compute_dtype = weight.dtype
    device_type = images.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        compute_dtype = torch.get_autocast_dtype(device_type)
    if out_dtype is None:
        out_dtype = compute_dtype
    elif out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype must be one of {_names(FLOAT_DTYPES)}, got {out_dtype!r}")
    if scale is None:
        scale = 1 / 255 if images.dtype == torch.uint8 else 1.0
    elif isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"scale must be a number, got {type(scale).__name__} {scale!r}")
    elif not math.isfinite(scale) or scale == 0:
        raise ValueError(f"scale must be finite and not 0, got {scale}")
    return Arguments(
        patch if stride is None else _sizes("stride", stride, len(patch), 1),
        _sizes("padding", padding, len(patch), 0),
        _channel_values("mean", mean),
        _channel_values("std", std),
        float(scale),
        compute_dtype,
        out_dtype,
    )


def problem_of(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pos_embed: torch.Tensor | None,
    prefix: torch.Tensor | None,
    keep: torch.Tensor | None,
    arguments: Arguments,
) -> PatchProblem:
    """Check the tensors' metadata against each other; raises ValueError or TypeError with the numbers in it."""
    metas = (
        _tensor("images", images, IMAGE_DTYPES),
        _tensor("weight", weight, FLOAT_DTYPES),
        None if bias is None else _tensor("bias", bias, FLOAT_DTYPES),
        None if pos_embed is None else _tensor("pos_embed", pos_embed, FLOAT_DTYPES),
        None if prefix is None else _tensor("prefix", prefix, FLOAT_DTYPES),
        None if keep is None else _tensor("keep", keep, KEEP_DTYPES),
    )
    try:
        return _cached(*metas, arguments)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
    return build(*metas, arguments)  # symbolic sizes, under torch.compile or torch.export


def build(
    images: Meta,
    weight: Meta,
    bias: Meta | None,
    pos_embed: Meta | None,
    prefix: Meta | None,
    keep: Meta | None,
    arguments: Arguments,
) -> PatchProblem:
    images, weight = Meta(*images), Meta(*weight)
    bias, pos_embed, prefix, keep = (m if m is None else Meta(*m) for m in (bias, pos_embed, prefix, keep))
    dims = len(weight.shape)
    letters = "[B,C,H,W]" if dims == 4 else "[B,C,F,H,W]"
    if len(images.shape) != dims:
        hint = "; add the batch dimension with images[None]" if len(images.shape) == dims - 1 else ""
        raise ValueError(
            f"images must be {letters} to go with a {dims}-D weight {list(weight.shape)}, "
            f"got {len(images.shape)} dimensions {list(images.shape)}{hint}"
        )
    for name, other in (
        ("weight", weight), ("bias", bias), ("pos_embed", pos_embed), ("prefix", prefix), ("keep", keep),
    ):  # fmt: skip
        if other is not None and other.device != images.device:
            raise ValueError(f"{name} is on {other.device}, images are on {images.device}")

    _check_patches(images, weight, arguments)

    video = dims == 5
    lead = () if video else (1,)
    B, C, *size = images.shape
    D, _, *patch = weight.shape
    if bias is not None and bias.shape != (D,):
        raise ValueError(f"bias must be [D] = [{D}], got {list(bias.shape)}")
    T = 0 if prefix is None else _rows("prefix", prefix, B, D, "T")
    n_keep = None
    if keep is not None:
        if len(keep.shape) != 2 or keep.shape[0] != B:
            raise ValueError(f"keep must be [B,N_keep] with B = {B}, got {list(keep.shape)}")
        n_keep = keep.shape[1]

    sides = (*lead, *size)
    problem = PatchProblem(
        B=B, C=C, F=sides[0], H=sides[1], W=sides[2], D=D, T=T,
        P=(*lead, *patch), S=(*lead, *arguments.stride), pad=(*(() if video else (0,)), *arguments.padding),
        n_keep=n_keep, video=video,
        tensors=_layouts(images, weight, bias, pos_embed, prefix, keep),
        has_bias=bias is not None,
        pos_rows=0 if pos_embed is None else _rows("pos_embed", pos_embed, B, D, "N or T+N"),
        pos_per_image=pos_embed is not None and len(pos_embed.shape) == 3 and pos_embed.shape[0] != 1,
        mean=_per_channel(arguments.mean, C), std=_per_channel(arguments.std, C), scale=arguments.scale,
        image_dtype=images.dtype, weight_dtype=weight.dtype,
        compute_dtype=arguments.compute_dtype, out_dtype=arguments.out_dtype, device=images.device,
    )  # fmt: skip
    N = problem.N
    if pos_embed is not None and problem.pos_rows != N and problem.pos_rows != T + N:
        raise ValueError(
            f"pos_embed {list(pos_embed.shape)} has {problem.pos_rows} rows; the grid "
            f"{'x'.join(map(str, problem.G if video else problem.G[1:]))} needs N = {N}, or T+N = {T + N} with T = {T}"
        )
    return problem


def _layouts(images: Meta, weight: Meta, *others: Meta | None) -> tuple[Layout | None, ...]:
    pictures = [Layout(m.dtype, video_strides(m.strides)) for m in (images, weight)]
    bias, *tables, keep = others
    return (
        *pictures,
        None if bias is None else Layout(bias.dtype, bias.strides),
        *(None if m is None else Layout(m.dtype, (_between_images(m), *m.strides[-2:])) for m in tables),
        None if keep is None else Layout(keep.dtype, keep.strides),
    )


def video_strides(steps: tuple[int, ...]) -> tuple[int, ...]:
    """A picture is a video of one frame."""
    return steps if len(steps) == 5 else (*steps[:2], 0, *steps[2:])


def _between_images(table: Meta) -> int:
    return table.strides[0] if len(table.shape) == 3 and table.shape[0] != 1 else 0


def _misplaced(images: Meta, C: int) -> str:
    """How images with the channels elsewhere are passed."""
    names = "BHWC" if len(images.shape) == 4 else "BFHWC"
    if images.shape[-1] == C:
        to = (0, 3, 1, 2) if len(names) == 4 else (0, 4, 1, 2, 3)
        return f"; if these are [{','.join(names)}], pass images.permute{to}, which copies nothing"
    if len(names) == 5 and images.shape[2] == C:
        return "; if these are [B,F,C,H,W], pass images.transpose(1, 2), which copies nothing"
    return ""


def _check_patches(images: Meta, weight: Meta, arguments: Arguments) -> None:
    """Patches of the weight's size fit the images, and everything there is by channel has as many."""
    _, C, *size = images.shape
    _, C_weight, *patch = weight.shape
    for name, sizes in (("weight", weight.shape), ("images' channels, height or width", images.shape[1:])):
        if any(s == 0 for s in sizes):
            raise ValueError(f"{name} must not be empty, got {list(sizes)}")
    if C != C_weight:
        hint = _misplaced(images, C_weight)
        raise ValueError(f"images have {C} channels, weight {list(weight.shape)} takes {C_weight}{hint}")
    for s, p, pad in zip(size, patch, arguments.padding, strict=True):
        if s + 2 * pad < p:
            raise ValueError(
                f"images of {'x'.join(map(str, size))} with padding {arguments.padding} are smaller than "
                f"the patch {'x'.join(map(str, patch))}: {s + 2 * pad} < {p}"
            )
    for name, values in (("mean", arguments.mean), ("std", arguments.std)):
        if values is not None and len(values) not in (1, C):
            raise ValueError(f"{name} must have one value per channel: got {len(values)} for {C} channels")


_cached = lru_cache(maxsize=1024)(build)


def check_keep(problem: PatchProblem, keep: torch.Tensor | None) -> None:
    """Check the values of `keep` where that costs no device synchronisation: on the CPU."""
    if keep is None or keep.device.type != "cpu" or keep.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(keep))
    if low < 0 or high >= problem.N:
        raise ValueError(f"keep must hold patch indices 0..{problem.N - 1}, got {low}..{high}")


def in_grid(problem: PatchProblem, keep: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`keep` with what is out of range set to 0, and a mask of that; no mask where `check_keep` looked already."""
    if keep is None or keep.device.type == "cpu":
        return keep, None
    outside = (keep < 0) | (keep >= problem.N)
    return keep.masked_fill(outside, 0), outside


def _tensor(name: str, value: Any, dtypes: tuple[torch.dtype, ...]) -> Any:
    """The fields of the tensor's `Meta`, bare: this runs at every call."""
    if isinstance(value, torch.Tensor) and value.dtype in dtypes and value.layout is torch.strided:
        return value.shape, value.stride(), value.dtype, value.device
    if not isinstance(value, torch.Tensor):
        hint = "; wrap an array with torch.from_numpy" if type(value).__module__ == "numpy" else ""
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}{hint}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be one of {_names(dtypes)}, got {value.dtype} with shape {_shape(value)}")
    raise TypeError(f"{name} must be a dense tensor, got layout {value.layout} with shape {_shape(value)}")


def _rows(name: str, meta: Meta, B: int, D: int, rows: str) -> int:
    shape = meta.shape
    if len(shape) not in (2, 3) or shape[-1] != D or (len(shape) == 3 and shape[0] != 1 and shape[0] != B):
        raise ValueError(
            f"{name} must be [rows,D], [1,rows,D] or [B,rows,D] with rows = {rows}, D = {D}, B = {B}; got {list(shape)}"
        )
    return shape[-2]


def _sizes(name: str, value: int | Sequence[int], dims: int, least: int) -> tuple[int, ...]:
    try:
        sizes = tuple(index(v) for v in value) if isinstance(value, Sequence) else (index(value),) * dims
    except TypeError:
        raise TypeError(f"{name} must be an int or {dims} ints, got {value!r}") from None
    if len(sizes) != dims:
        raise ValueError(f"{name} must be an int or {dims} ints, got {len(sizes)}: {value!r}")
    if any(v < least for v in sizes):
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    if any(v >= 2**31 for v in sizes):
        raise ValueError(f"{name} must be below {2**31}, got {value!r}")
    return sizes


def _channel_values(name: str, value: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    if hasattr(value, "tolist"):  # a tensor or a NumPy array; a tensor on a GPU is read back, which waits for it
        value = value.reshape(-1).tolist()
    if isinstance(value, Real):
        value = (value,)
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(v, Real) for v in value):
        raise TypeError(f"{name} must be one number per channel, got {value!r}")
    try:
        values = tuple(float(v) for v in value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got an integer past the range of floats") from None
    if not all(math.isfinite(v) for v in values) or (name == "std" and any(v <= 0 for v in values)):
        raise ValueError(f"{name} must be finite{' and above 0' if name == 'std' else ''}, got {values}")
    return values


def _per_channel(values: tuple[float, ...] | None, C: int) -> tuple[float, ...] | None:
    return values * C if values is not None and len(values) == 1 else values


def _shape(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
