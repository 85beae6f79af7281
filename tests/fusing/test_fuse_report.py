"""What vk.fuse reports: the front ends that it found, and how often each was one call."""

import copy
import json
import pickle

import pytest
import torch
from models import build
from torch import nn

import vitkernels as vk


class Stem(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 9, 4, 4, **kwargs), nn.ReLU(), nn.Conv2d(9, 8, 2, 2))


def test_report_lists_every_front_end():
    others = {"b": Stem(groups=3), "c": vk.PatchEmbed(32, 8), "d": nn.Conv3d(3, 4, 2, 2), "e": nn.Conv2d(3, 4, 3)}
    report = vk.fuse(nn.ModuleDict({"a": build("timm")[0], **others, "f": Stem()}))
    assert [(e.name, e.fused) for e in report] == [("a", True), ("b", False), ("", True), ("f", True)]
    assert "groups 3" in report.skipped[0].note
    assert {e.note for e in report.fused[1:]} == {"projection only"}
    assert json.loads(report.to_json()) == report.to_dicts()
    assert report.to_dicts()[0]["cls"] == "timm.models.vision_transformer.VisionTransformer"
    lines = str(report).splitlines()
    assert ["left alone" in line for line in lines] == [False, True, False, False]
    assert str(vk.fuse(nn.Linear(2, 2))) == "no front end found"
    assert pickle.loads(pickle.dumps(report)) == copy.deepcopy(report) == report


def test_report_is_read_in_100_columns():
    """The verdict and the note first; of a long name its end."""
    model = nn.ModuleDict(
        {"a_tower_with_a_long_name": nn.ModuleDict({"of_many_parts_in_a_row_of_modules": build("clip")[0]})}
    )
    model["other"] = nn.Sequential(nn.Conv2d(4, 4, 4, 4, groups=2, dilation=(3, 5), padding=(100, 200)))
    one, other = str(vk.fuse(model)).splitlines()
    assert one.startswith("fused       projection; position and prefix")
    assert one.endswith("embeddings CLIPVisionEmbeddings")
    assert other.startswith("left alone  the projection has groups 2")
    assert "…" in other
    assert max(len(one), len(other)) <= 100


def test_calls_are_counted_with_the_reason():
    model, images, _ = build("timm")
    report = vk.fuse(model)
    assert report.calls() == {}
    model(images)
    model(images)
    assert report.calls() == {"": {"one call": 2}}
    handle = model.patch_embed.proj.register_forward_hook(lambda *_: None)
    model(images)
    handle.remove()
    assert report.calls()[""] == {"one call": 2, "patch_embed.proj has hooks": 1}
    with pytest.raises(AssertionError):
        model(images[:, :, :16])
    assert report.calls()[""]["[2, 3, 16, 32] torch.float32"] == 1
    for size in range(40, 80):
        with pytest.raises(AssertionError):
            model(torch.zeros(1, 3, size, 32))
    assert len(report.calls()[""]) <= 21
    assert vk.fuse(model).calls() == {}
    with pytest.raises(ReferenceError):
        copy.deepcopy(report).calls()


def test_calls_of_a_front_end_whose_own_code_runs():
    model, images, _ = build("clip")
    report = vk.fuse(model)
    model(images)
    assert report.calls() == {"embeddings": {"one call": 1}, "embeddings.patch_embedding": {"one call": 1}}
    model.embeddings.position_embedding.register_forward_hook(lambda *_: None)
    model(images)
    assert report.calls()["embeddings"] == {"one call": 1, "a module inside has hooks": 1}
    compiled = torch.compile(model, backend="eager")
    before = report.calls()
    compiled(images)
    assert report.calls() == before
