"""The same launch again and again, beside other work: what is wrong once in a thousand times shows itself.

A kernel here gives the same bits for the same inputs. So hundreds of launches are held to the first, element by element
and on the device, while copies run on another stream, products and pauses shift when blocks arrive, and memory that is
handed out for results holds NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import torch

Results = Sequence[tuple[str, torch.Tensor]]  # name -> what one launch gave

LOOK = 20  # launches between two looks at what was found: each waits for the device
COPIED = 64 << 20  # bytes of a copy beside a launch
PAUSE = 40_000  # clock cycles at most: some 20 µs
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def hunt(run: Callable[[], Results], launches: int, tick: Callable[[], object] = lambda: None) -> str:
    """How the results of some launch differ from those of the first: which, the element, both values; or nothing."""
    first = [(name, t.detach().clone()) for name, t in run() if t.numel()]
    disturb = _disturbance(first)
    found: list[torch.Tensor] = []
    for launch in range(1, launches):
        disturb(launch)
        again = [(name, t.detach()) for name, t in run() if t.numel()]
        found += [_compared(launch, i, was, t) for i, ((_, was), (_, t)) in enumerate(zip(first, again, strict=True))]
        tick()
        if launch % LOOK == 0 or launch == launches - 1:
            for differs, number, i, at, before, now in torch.stack(found).tolist() if found else ():
                if differs:
                    name, was = first[int(i)]
                    index = [int(n) for n in torch.unravel_index(torch.tensor(int(at)), was.shape)]
                    return f"{name}{index} was {before!r} and is {now!r} in launch {int(number) + 1} of {launches}"
            found.clear()
    return ""


def _compared(launch: int, i: int, was: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """[6]: whether anything differs, the launch, the result, the element, its two values. Nothing waits for it.

    Values in fp64, which holds those of every dtype, so that two which differ print differently (`repr`), but for NaNs.
    """
    if now.shape != was.shape or now.dtype != was.dtype:
        raise ValueError(f"a launch gave {list(now.shape)} {now.dtype} after {list(was.shape)} {was.dtype}")
    integer = INTEGERS[was.dtype.itemsize]
    wrong = (was.view(integer) != now.view(integer)).flatten()
    at = wrong.to(torch.uint8).argmax()
    numbers = [wrong.any(), was.new_tensor(launch, dtype=torch.float64), was.new_tensor(i, dtype=torch.float64)]
    numbers += [at, was.flatten()[at], now.flatten()[at]]
    return torch.stack([n.to(torch.float64) for n in numbers])


def _disturbance(results: Results) -> Callable[[int], None]:
    """What is done before a launch, another thing each time; on a CPU nothing."""
    device = results[0][1].device if results else torch.device("cpu")
    if device.type != "cuda":
        return lambda launch: None
    side = torch.cuda.Stream(device)
    copied = torch.zeros(2, COPIED, dtype=torch.uint8, device=device)
    factor = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16)

    def disturb(launch: int) -> None:
        rng = Random(launch)
        with torch.cuda.device(device):
            for _, t in results:  # freed at once: the next output of this size may lie here
                torch.full(t.shape, float("nan"), dtype=t.dtype, device=device)
            with torch.cuda.stream(side):
                if rng.random() < 0.3:
                    torch.cuda._sleep(rng.randrange(PAUSE))
                for _ in range(rng.randrange(3)):
                    copied[0].copy_(copied[1], non_blocking=True)
                if rng.random() < 0.3:
                    factor @ factor
            if rng.random() < 0.3:
                torch.cuda._sleep(rng.randrange(PAUSE))
            size = rng.choice((0, 64, 512, 2048))
            if size:
                factor[:size] @ factor

    return disturb
