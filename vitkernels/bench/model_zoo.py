"""Models by a short text: what is built, with random weights, and what it takes. Nothing is downloaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

Shape = tuple[int, ...]

# What benchmarks time, from the front end that is the largest part of its model to the smallest.
MODELS = {
    "mae-b16": "transformers:ViTMAEModel",
    "videomae-b16": "transformers:VideoMAEModel",
    "videomae-b16-masked": "transformers:VideoMAEModel,mask_ratio=0.9",  # its encoder in pretraining
    "vit-ti16": "timm:vit_tiny_patch16_224",
    "vit-s16": "timm:vit_small_patch16_224",
    "vit-b16": "timm:vit_base_patch16_224",
    "vit-l14": "timm:vit_large_patch14_clip_224",
    "vit_pytorch-b16": "vit_pytorch:ViT",
}
VIT_B16 = {
    "image_size": 224, "patch_size": 16, "num_classes": 1000, "dim": 768, "depth": 12, "heads": 12, "mlp_dim": 3072,
}  # fmt: skip


def load_model(spec: str) -> tuple[torch.nn.Module, Shape]:
    """A model and the size of one input: (C, H, W), of a video model (F, C, H, W).

    `spec` is a key of MODELS, or "timm:NAME", "torchvision:NAME", "transformers:CLASS" (its default configuration) or
    "vit_pytorch:CLASS" (of ViT-B/16's size); then ",KEY=VALUE…" for the constructor or configuration:
    "timm:vit_small_patch16_224,img_size=384".

    Raises:
        ValueError: no such library, model, or not KEY=VALUE.
        ImportError: the library is not installed.
    """
    source, _, rest = MODELS.get(spec, spec).partition(":")
    name, *words = rest.split(",")
    if not name or source not in SOURCES:
        raise ValueError(
            f"a model is one of {', '.join(MODELS)}, or timm:NAME, torchvision:NAME, transformers:CLASS or "
            f"vit_pytorch:CLASS, then ,KEY=VALUE…; got {spec!r}"
        )
    options = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{spec!r}: {word!r} is not KEY=VALUE")
        options[key] = _value(value)
    return SOURCES[source](name, options)


def _value(text: str) -> Any:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            pass
    return {"True": True, "False": False, "None": None}.get(text, text)


def _timm(name: str, options: dict[str, Any]) -> tuple[torch.nn.Module, Shape]:
    import timm

    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}; see timm.list_models('vit_*')")
    model = timm.create_model(name, pretrained=False, **options)
    C, *size = timm.data.resolve_model_data_config(model)["input_size"]
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)  # as img_size= made it
    return model, (C, *(built or size))


def _torchvision(name: str, options: dict[str, Any]) -> tuple[torch.nn.Module, Shape]:
    import torchvision

    model = torchvision.models.get_model(name, weights=None, **options)
    size = getattr(model, "image_size", 224)
    return model, (3, size, size)


def _transformers(name: str, options: dict[str, Any]) -> tuple[torch.nn.Module, Shape]:
    import transformers

    cls = getattr(transformers, name, None)
    if cls is None or getattr(cls, "config_class", None) is None:
        raise ValueError(f"transformers has no model class {name!r}")
    whole = cls.config_class(**options)
    config = getattr(whole, "vision_config", whole)
    H, W = config.image_size if isinstance(config.image_size, list | tuple) else (config.image_size,) * 2
    shape = getattr(config, "num_channels", 3), H, W
    return cls(whole), (config.num_frames, *shape) if hasattr(config, "num_frames") else shape


def _vit_pytorch(name: str, options: dict[str, Any]) -> tuple[torch.nn.Module, Shape]:
    import vit_pytorch

    cls = getattr(vit_pytorch, name, None)
    if not inspect.isclass(cls):
        raise ValueError(f"vit_pytorch has no model class {name!r}")
    options = VIT_B16 | options
    return cls(**options), (options.get("channels", 3), options["image_size"], options["image_size"])


SOURCES: dict[str, Callable[[str, dict[str, Any]], tuple[torch.nn.Module, Shape]]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
    "vit_pytorch": _vit_pytorch,
}


def inputs(
    model: torch.nn.Module, shape: Shape, batch: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Random images (videos) and what else the model's forward takes: a mask where its configuration has a ratio and
    its forward wants the mask itself, as VideoMAE's does."""
    g = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *shape, generator=g).to(device, dtype)
    ratio = getattr(getattr(model, "config", None), "mask_ratio", None)
    if ratio is None or "bool_masked_pos" not in inspect.signature(model.forward).parameters:
        return images, {}
    N: int = next(m.num_patches for m in model.modules() if hasattr(m, "num_patches"))
    order = torch.rand(batch, N, generator=g).argsort(1)
    return images, {"bool_masked_pos": (order < round(N * ratio)).to(device)}


def first_block(model: torch.nn.Module) -> torch.nn.Module | None:
    """What is called first behind the front end: the first of a stack of like modules that have parts of their own."""
    for stack in model.modules():
        if not isinstance(stack, torch.nn.ModuleList | torch.nn.Sequential) or not len(stack):
            continue
        first = stack[0]
        if len({type(block) for block in stack}) == 1 and next(first.children(), None) is not None:
            while isinstance(first, torch.nn.ModuleList):  # a block that is a list is never called itself
                first = first[0]
            return first
    return None
