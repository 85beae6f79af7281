"""Graphs that are to run where this package is not: torch.jit's and ONNX's, of calls, layers and models."""

import re

import pytest
import torch
from problems import arguments, onnx

import vitkernels as vk

OURS = re.compile(r"vitkernels::|ops\.vitkernels")
pytestmark = pytest.mark.filterwarnings("ignore")  # torch.jit's, of Python values


class Called(torch.nn.Module):
    def __init__(self, **call):
        super().__init__()
        self.call = call

    def forward(self, images):
        return vk.patch_embed(images, **self.call)


def called(**more):
    call = arguments(**{"B": 2, "D": 24, "weights": torch.float32, "pixels": torch.float32, **more})
    images = call.pop("images")
    return lambda: (Called(**call), images)


MODELS = {
    "call": called(),
    "bytes": called(pixels=torch.uint8, mean=(0.4, 0.5, 0.6), std=0.25),
    "padded, overlapping": called(P=8, padding=3, stride=5, pos="N"),
    "kept": called(kept=3, scale=0.5),
    "to bf16": called(out_dtype=torch.bfloat16, pos=None, T=0),
    "layer": lambda: (vk.PatchEmbed(img_size=32, patch_size=8, embed_dim=24), torch.rand(2, 3, 32, 32)),
    "model": lambda: (
        vk.ViT(image_size=32, patch_size=8, num_classes=5, dim=24, depth=1, heads=2, mlp_dim=48),
        torch.rand(2, 3, 32, 32),
    ),
}


@pytest.mark.parametrize("way", [torch.jit.trace, onnx])
@pytest.mark.parametrize("name", MODELS)
def test_a_graph_knows_no_operation_of_ours(name, way):
    model, images = MODELS[name]()
    graph = way(model.eval(), images)
    assert not OURS.search(str(graph.graph))
    other = images.flip(0, 3)
    torch.testing.assert_close(graph(other), model(other), rtol=2**-7 if name == "to bf16" else 1e-4, atol=1e-4)


def test_batches_of_any_size():
    model, images = MODELS["model"]()
    more = torch.rand(5, 3, 32, 32)
    for graph in (torch.jit.trace(model, images), onnx(model, images, dynamic_shapes=({0: torch.export.Dim("B")},))):
        torch.testing.assert_close(graph(more), model(more), rtol=1e-4, atol=1e-4)


def test_without_onnx_the_operation_is_exported():
    model, images = MODELS["layer"]()
    assert OURS.search(str(torch.export.export(model, (images,)).graph))


@pytest.mark.parametrize("way", [torch.jit.trace, onnx])
def test_wrong_inputs_are_still_wrong(way):
    with pytest.raises(ValueError, match=r"images have 4 channels, weight .* takes 3"):
        way(MODELS["call"]()[0], torch.rand(2, 4, 32, 48))
