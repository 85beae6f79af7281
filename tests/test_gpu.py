"""What is remembered of a GPU, and asked of one, is that GPU's, whichever is current."""

from contextlib import contextmanager

import pytest
import torch

from vitkernels import gpu as devices
from vitkernels.backends import common
from vitkernels.backends.triton import forward_plan, launch
from vitkernels.bench import peaks
from vitkernels.profiling import compile_triton

CUDA, CUDA_1 = torch.device("cuda"), torch.device("cuda", 1)


@pytest.fixture
def current(monkeypatch):
    """Two GPUs of which one is current: a list of it."""
    now = [0]

    @contextmanager
    def switched(device):
        before, now[0] = now[0], device.index
        yield
        now[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "device", switched)
    return now


def test_a_gpu_without_a_number_is_the_current_one(current, monkeypatch):
    monkeypatch.setattr(devices, "_gpu_of", lambda device: device)
    monkeypatch.setattr(peaks, "_peaks", lambda device, *_: device)
    for now in (0, 1):
        current[0] = now
        assert devices.gpu_of(CUDA) == peaks.peaks(CUDA, torch.float32) == torch.device("cuda", now)
        assert devices.gpu_of(CUDA_1) == peaks.peaks(CUDA_1, torch.float32) == CUDA_1
    assert devices.indexed(torch.device("cpu")) == torch.device("cpu")


def test_a_capture_is_asked_for_on_the_problems_gpu(current, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] == 1)
    assert devices.capturing(CUDA_1) and not devices.capturing(torch.device("cuda", 0))
    assert current == [0]
    assert not devices.capturing(torch.device("cpu"))


def test_a_context_is_bound_by_a_call_that_needs_one(monkeypatch):
    called = []
    monkeypatch.setattr(torch.cuda.Stream, "priority_range", lambda: called.append("here"))
    devices.bind_context(torch.device("cpu"))
    assert called == []
    devices.bind_context(CUDA_1)
    assert called == ["here"]


@pytest.mark.parametrize("home", [common, launch])
def test_constants_made_twice_at_a_time_are_kept_once(home, monkeypatch):
    """By two threads: what one of them may have captured in a graph stays."""
    p = compile_triton.problem(16, "uint8->bf16")
    others = torch.zeros(2, 3)

    class Late(dict):
        def get(self, key):
            self.setdefault(key, others)

    monkeypatch.setattr(home, "_constants", Late())
    order = (torch.float32,) if home is common else (forward_plan.Order(False, None), p.K)
    assert home.centred(p, *order) is others
