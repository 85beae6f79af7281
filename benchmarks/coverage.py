"""What `vk.fuse` takes of every architecture of the installed libraries: `python benchmarks/coverage.py`.

Every model is built without memory (on the meta device, transformers' with few layers), fused and run to see what its
one call holds. transformers' embeddings are run with random weights, fused beside plain: another result or gradient is
an error. Writes docs/coverage.md; --json prints the rows.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import json
import math
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import vitkernels as vk
from vitkernels.fusing import structure
from vitkernels.fusing.pending import Embedding

LEVELS = {
    "whole": "projection, with position and prefix where the model has them, in one call",
    "projection": "projection in one call; position and prefix, if there are any, stay with the model",
    "left": "left alone",
}
Built = tuple[nn.Module, Callable[[], Any] | None]  # a model, and how it is run


class Given(TorchDispatchMode):
    """Whether a call of the operation was given positions or prefix tokens, and whether there was one."""

    def __init__(self):
        super().__init__()
        self.calls: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.vitkernels.patch_embed.default:
            _, _, _, pos, prefix, *_ = args
            self.calls.append(pos is not None or prefix is not None)
        return func(*args, **(kwargs or {}))


def timm_models() -> Iterator[tuple[str, Callable[[], Built]]]:
    import timm

    for name in timm.list_models():
        yield name, lambda name=name: _of_images(timm.create_model(name))


def torchvision_models() -> Iterator[tuple[str, Callable[[], Built]]]:
    import torchvision

    for name in torchvision.models.list_models():
        options = inspect.signature(torchvision.models.get_model_builder(name)).parameters
        none = {option: None for option in ("weights", "weights_backbone") if option in options}
        yield name, lambda name=name, none=none: _of_images(torchvision.models.get_model(name, **none))


def _of_images(model: nn.Module) -> Built:
    channels, *size = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
    clip = (16,) if "swin3d" in str(type(model)).lower() or "video" in type(model).__module__ else ()
    return model, lambda: model(torch.empty(2, channels, *clip, *size))


def transformers_models() -> Iterator[tuple[str, Callable[[], Built]]]:
    from transformers import logging
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    logging.set_verbosity_error()
    for kind in sorted(CONFIG_MAPPING_NAMES):
        config = CONFIG_MAPPING[kind]
        try:
            names = vars(config())
        except Exception:  # it has no defaults
            continue
        if names.keys() & {"image_size", "patch_size", "vision_config", "backbone_config"}:
            yield kind, partial(_of_transformers, config)


def _of_transformers(config: Any) -> Built:
    from transformers import PreTrainedModel as base

    modeling = importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
    classes = [
        c for c in vars(modeling).values()
        if inspect.isclass(c) and issubclass(c, base) and c.config_class is config and c.__module__ == modeling.__name__
    ]  # fmt: skip
    classes.sort(key=lambda c: (c.__name__.endswith("PreTrainedModel"), not c.__name__.endswith("Model"), c.__name__))
    built: nn.Module | None = None
    error: Exception = LookupError(f"no model of {config.__name__}")
    for cls in classes:
        for make in (lambda: _shallow(config()), config):
            try:
                model = cls(make())
            except Exception as e:
                error = e
                continue
            if vk.fuse(model):
                return model, partial(_run_embeddings, model)
            built = built or model
            break
    if built is None:
        raise error
    return built, None


def _shallow(config: Any) -> Any:
    for name, value in list(vars(config).items()):
        if name in ("num_hidden_layers", "depth", "num_layers", "encoder_layers", "decoder_layers") and value:
            setattr(config, name, 1)
        elif hasattr(value, "to_dict"):
            _shallow(value)
    return config


def _run_embeddings(model: Any) -> None:
    """The modules that add position and prefix, each by itself, with random weights, fused beside plain."""
    configs = model.config, getattr(model.config, "vision_config", None)
    size = next((c.image_size for c in configs if getattr(c, "image_size", None)), 224)
    size = (size, size) if isinstance(size, int) else tuple(size)
    frames = next((c.num_frames for c in configs if getattr(c, "num_frames", None)), 1)
    for module in model.modules():
        if isinstance(module, Embedding):
            fused = copy.deepcopy(module).to_empty(device="cpu").float().eval()
            for parameter in fused.parameters():
                parameter.normal_()
            for buffer in fused.buffers():  # indices, of which none is wrong
                buffer.zero_()
            plain = copy.deepcopy(fused)
            vk.unfuse(plain)
            conv = next(m for m in module.modules() if structure.patchifies(m))
            grid = [s // P for s, P in zip(size, conv.stride[-2:], strict=True)]
            mask = torch.ones(2, *grid, dtype=torch.bool, device="cpu")
            tries = [
                ((2, 3, *size), {}), ((2, frames, 3, *size), {}), ((2, 3, *size), {"patch_attention_mask": mask}),
                ((1, 3, *size), {"target_sizes": torch.tensor([grid], device="cpu")}),
            ]  # fmt: skip
            with torch.device("cpu"), torch.enable_grad():
                shape, options, (expected, gradients) = _first(plain, tries)
                out, found = _result(fused, torch.linspace(-1, 1, math.prod(shape)).view(shape), options)
            for a, b in ((out, expected), *zip(found, gradients, strict=True)):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().sum() and b.abs().max()))


def _first(plain: nn.Module, tries: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The first that goes through, and its result."""
    for last, (shape, options) in enumerate(tries, 1 - len(tries)):
        try:
            return shape, options, _result(plain, torch.linspace(-1, 1, math.prod(shape)).view(shape), options)
        except Exception:
            if not last:
                raise
    raise AssertionError


def _result(
    module: nn.Module, images: torch.Tensor, options: dict[str, Any]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    trained = [parameter.requires_grad_() for parameter in module.parameters()]
    out = module(images, **options)
    out = out if isinstance(out, torch.Tensor) else out[0]
    return out, list(torch.autograd.grad(out.square().sum(), trained, materialize_grads=True))


def vit_pytorch_models() -> Iterator[tuple[str, Callable[[], Built]]]:
    """Classes that are told the size of a patch, with arguments by their names."""
    import vit_pytorch

    for module in pkgutil.iter_modules(vit_pytorch.__path__, "vit_pytorch."):
        try:
            classes = vars(importlib.import_module(module.name)).values()
        except ImportError:  # of a library that is not here
            continue
        for cls in classes:
            if inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__module__ == module.name:
                parameters = inspect.signature(cls).parameters
                if any(name.endswith("patch_size") for name in parameters):
                    yield f"{module.name.partition('.')[2]}.{cls.__name__}", lambda c=cls: (c(**_arguments(c)), None)


def _arguments(cls: type) -> dict[str, Any]:
    sizes = {
        "image_size": 32, "patch_size": 8, "image_patch_size": 8, "frame_patch_size": 2, "freq_patch_size": 8,
        "frames": 4, "max_frames": 4, "seq_len": 32, "input_shape": (32, 32), "ndim": 2, "dim": 32, "num_classes": 5,
        "depth": 2, "spatial_depth": 1, "temporal_depth": 1, "cls_depth": 1, "heads": 2, "dim_head": 16, "mlp_dim": 48,
        "max_tokens_per_depth": (8,), "num_residual_streams": 2, "num_slots": 2, "window_size": 2,
        "transformer": nn.Identity(), "num_hierarchies": 2, "block_repeats": (1, 1), "cross_attn_depth": 1,
    }  # fmt: skip
    given = inspect.signature(cls).parameters
    return {
        k: v for k, v in sizes.items() if k in given and (given[k].default is inspect.Parameter.empty or "size" in k)
    }


LIBRARIES = {
    "timm": timm_models, "transformers": transformers_models, "torchvision": torchvision_models,
    "vit_pytorch": vit_pytorch_models,
}  # fmt: skip


def row_of(library: str, name: str, build: Callable[[], Built]) -> tuple[str, dict[str, str]] | None:
    """Its name and level; None: it has no patchify front end."""
    try:
        with torch.device("meta"):
            model, run = build()
    except LookupError:  # a configuration without a model, of a part
        return None
    except Exception as error:
        return name, {"level": "not built", "class": "", "note": f"{type(error).__name__}: {error}".partition("\n")[0]}
    if library == "transformers":
        name = type(model).__module__.split(".")[2]
    if not (report := vk.fuse(model)):
        return None
    best = max(report, key=lambda entry: entry.fused)
    row = {"level": "left", "class": best.cls.rpartition(".")[2], "note": "" if best.fused else best.note}
    if not best.fused:
        return name, row
    with torch.no_grad(), torch.device("meta"), Given() as given:
        try:
            if run is not None:
                run()
        except AssertionError as error:
            row["note"] = f"WRONG: {error}".partition("\n")[0]
        except Exception as error:
            row["note"] = f"not run: {type(error).__name__}"
    adapter = "position" in best.note and not best.note.startswith("projection;")
    row["level"] = "whole" if any(given.calls) or adapter else "projection"
    return name, row


def page(rows: dict[str, dict[str, dict[str, str]]]) -> str:
    """docs/coverage.md"""
    lines = [
        "# What `vk.fuse` takes, architecture by architecture",
        "",
        "Written by `python benchmarks/coverage.py`, of what is installed: a new release shows in the diff.",
        "Architectures without a patchify front end are not listed; those of transformers are its folders, with",
        "a model of each that has one, be it another folder's.",
        "",
        "| library | architectures | " + " | ".join(LEVELS.values()) + " |",
        "| --- | --- | " + " | ".join("---" for _ in LEVELS) + " |",
    ]
    for library, found in rows.items():
        counts = [sum(row["level"] == level for row in found.values()) for level in LEVELS]
        lines.append(f"| {library} {version(library)} | {sum(counts)} | " + " | ".join(map(str, counts)) + " |")
    for library, found in rows.items():
        lines += ["", f"## {library}"]
        for level, what in {**LEVELS, "not built": "not built here"}.items():
            classes: dict[str, list[str]] = {}
            for name, row in found.items():
                if row["level"] == level:
                    note = f" ({row['note']})" if row["note"] else ""
                    classes.setdefault(f"`{row['class']}`{note}" if row["class"] else note.strip(" ()"), []).append(
                        name
                    )
            if classes:
                lines += ["", f"**{what[0].upper()}{what[1:]}:**", ""]
                lines += [f"- {cls}: {', '.join(names)}" for cls, names in sorted(classes.items())]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("libraries", nargs="*", choices=[*LIBRARIES, []], help="by default all that are installed")
    parser.add_argument("--json", action="store_true", help="print the rows instead of writing docs/coverage.md")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    rows: dict[str, dict[str, dict[str, str]]] = {}
    for library in args.libraries or LIBRARIES:
        rows[library] = {}
        for name, build in tqdm(list(LIBRARIES[library]()), desc=library, file=sys.stderr):
            if (found := row_of(library, name, build)) is not None:
                name, row = found
                before = rows[library].get(name, row)
                rows[library][name] = min(before, row, key=lambda r: [*LEVELS, "not built"].index(r["level"]))
    wrong = [name for found in rows.values() for name, row in found.items() if row["note"].startswith("WRONG")]
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        Path(__file__).parents[1].joinpath("docs", "coverage.md").write_text(page(rows))
    if wrong:
        sys.exit(f"fused models of these give other results: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
