"""Graphs, streams and devices: what is remembered of a call holds no address, and no stream but the current one."""

from functools import partial

import pytest
import torch
from problems import arguments

import vitkernels as vk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(params=["reference", "triton", "cuda"])
def step(request):
    """step(call): the tokens, by each backend that runs here."""
    if reasons := vk.explain(**made()).get(request.param):
        pytest.skip("; ".join(reasons))
    return partial(vk.patch_embed, backend=request.param)


def made(device="cuda:0", seed=0):
    call = arguments(2, 3, 32, 48, 16, 40, pixels=torch.uint8, device=device, mean=0.5, std=(0.2, 0.3, 0.4))
    generator = torch.Generator().manual_seed(seed)
    call["images"].copy_(torch.randint(0, 256, call["images"].shape, generator=generator))
    return call


def test_a_graph_reads_what_lies_there_when_it_is_replayed(step):
    call = made()
    for _ in range(2):
        step(**call)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(**call)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = step(**call)
    other = made(seed=1)
    call["images"].copy_(other["images"])
    call["weight"].mul_(2)
    expected = step(**call)
    graph.replay()
    assert torch.equal(tokens, expected)


def test_streams_do_not_wait_for_each_other(step):
    """Each call goes to the stream that is current, known or not."""
    calls = [made(seed=seed) for seed in range(4)]
    expected = [step(**call) for call in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    found = []
    for stream, call in zip(streams, calls, strict=True):
        with torch.cuda.stream(stream):
            late = torch.empty_like(call["images"])
            torch.cuda._sleep(10_000_000)  # what the stream has to do first
            late.copy_(call["images"])
            found.append(step(**call | {"images": late}))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_device_that_is_not_the_current_one(step):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    expected = step(**made()).cpu()
    call = made("cuda:1")
    call["weight"].requires_grad_()
    tokens = step(**call)
    tokens.sum().backward()
    assert torch.cuda.current_device() == 0
    assert tokens.device == call["weight"].grad.device == torch.device("cuda", 1)
    assert torch.equal(tokens.detach().cpu(), expected)
