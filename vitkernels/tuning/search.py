"""The search for the fastest of many candidates: best guess first, bad ones dropped early, killed at any moment."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..backends.triton.configs import Choice
from ..backends.user_cache import locked

SHORT, LONG = 8.0, 25.0  # milliseconds of samples: of a first look, of a finalist in each of the rounds
SLOWER = 1.3  # times the best so far: no finalist
HOPELESS = 1.6  # times the best so far: other stages and warps of this tile are not tried
FINALISTS, ROUNDS = 6, 5
INF = float("inf")
TIE = 0.98  # of the default's time: what gains less does not replace it

Timer = Callable[[Choice, float], float]  # a candidate, milliseconds for samples -> milliseconds of one run


class Progress(NamedTuple):
    done: int  # candidates timed or dropped
    total: int
    text: str  # the candidate and what became of it
    best_ms: float
    seconds_left: float


class Found(NamedTuple):
    choice: Choice
    ms: float
    default_ms: float | None  # None where the default itself did not run
    tried: int  # candidates that were run, before a kill too
    dropped: int  # not run, as their tile was hopeless
    resumed: int  # of `tried`, those that a journal knew


class Journal:
    """What a search has done so far, a line each in a file beside the cache, so that a killed one goes on.

    The first line says what is searched; a file that says otherwise (another Triton, another driver) is begun anew. A
    candidate that was begun and has no result ended the process: it is not tried again.
    """

    def __init__(self, file: Path, head: dict[str, Any]):
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = file
        self.times: dict[Any, float] = {}
        self._out = file.open("a+b")
        self._lock = locked(self._out, wait=False)
        try:
            self._lock.__enter__()
        except BlockingIOError:
            self._out.close()
            raise BlockingIOError(f"another process is searching the same problem: it has {file}") from None
        self._out.seek(0)
        lines = list(_lines(self._out.read()))
        if not lines or lines[0][0].get("head") != head:
            self._out.truncate(0)
            self._write({"head": head})
            return
        self._out.truncate(lines[-1][1])  # a line that was being written when the process ended
        for line, _ in lines[1:]:
            choice = _tuples(line["choice"])
            if line["event"] == "withdrawn":
                self.times.pop(choice, None)
            else:
                self.times[choice] = line.get("ms") or INF  # begun: until a result follows

    def begun(self, choice: tuple[Any, ...]) -> None:
        self._note("begun", choice)

    def done(self, choice: tuple[Any, ...], **result: float | str) -> None:
        self._note("done", choice, **result)

    def withdrawn(self, choice: tuple[Any, ...]) -> None:
        self._note("withdrawn", choice)

    def close(self, *, remove: bool) -> None:
        if self._out.closed:
            return
        self._lock.__exit__(None, None, None)
        self._out.close()
        if remove:
            self.file.unlink(missing_ok=True)

    def _note(self, event: str, choice: tuple[Any, ...], **result: float | str) -> None:
        self._write({"event": event, "choice": choice, **result})

    def _write(self, line: dict[str, Any]) -> None:
        self._out.write(json.dumps(line).encode() + b"\n")
        self._out.flush()
        os.fsync(self._out.fileno())


def _tuples(value: Any) -> Any:
    """What JSON made lists of; a `Config` is as good as its tuple."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _lines(data: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """(line, where it ends), up to the first that is not whole."""
    end = 0
    for text in data.splitlines(keepends=True):
        end += len(text)
        try:
            line = json.loads(text)
        except ValueError:
            return
        if not text.endswith(b"\n") or not isinstance(line, dict):
            return
        yield line, end


@contextmanager
def journal(file: Path, head: dict[str, Any]) -> Iterator[Journal]:
    """A journal that is gone when the search ends by itself, and stays when anything stops it."""
    found, ended = Journal(file, head), False
    try:
        yield found
        ended = True
    finally:
        found.close(remove=ended)


def search(
    candidates: Sequence[Choice],
    timer: Timer,
    notes: Journal,
    *,
    seconds: float = 60.0,
    alive: Callable[[], object] = lambda: None,
    progress: Callable[[Progress], object] = lambda event: None,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """The fastest of the candidates, the first of which is the default and the rest in order of promise.

    Each is timed briefly. One that takes 1.3 × as long as the best so far is out, and one that takes 1.6 × as long
    takes with it the other stages and warps of its tile. The best few and the default are then timed longer, in turns.

    Args:
        seconds: after which no further candidate is begun; the finalists take a second or two more.
        alive: raises where an error of a candidate has left the device unusable; then the search stops, and when it is
            run again it goes on behind that candidate.

    Raises:
        RuntimeError: no candidate ran.
    """
    stop = clock() + seconds
    times = notes.times
    resumed, tried, dropped = sum(c in times for c in candidates), 0, 0
    tiles: dict[tuple[object, ...], float] = {}  # of those that ran: a tile that doesn't fit may with fewer stages

    def noted(choice: Choice, ms: float) -> float:
        times[choice] = ms
        if ms < INF:
            tiles[_tile(choice)] = min(ms, tiles.get(_tile(choice), INF))
        return ms

    best = min((noted(c, times[c]) for c in candidates if c in times), default=INF)
    for done, choice in enumerate(candidates, 1):
        if choice in times:
            tried += 1
            continue
        left = stop - clock()
        if left <= 0:
            break
        if tiles.get(_tile(choice), 0.0) > HOPELESS * best:
            dropped += 1
            continue
        progress(Progress(done - 1, len(candidates), named(choice), best, left))
        notes.begun(choice)
        tried += 1
        try:
            ms = timer(choice, SHORT)
        except Exception as error:  # a candidate that doesn't compile or fit is no candidate; the next one may be
            notes.done(choice, error=f"{type(error).__name__}: {error}"[:300])
            ms, what = INF, type(error).__name__
            alive()
        except BaseException:  # someone stops the search: that is not the candidate's doing
            notes.withdrawn(choice)
            raise
        else:
            notes.done(choice, ms=ms)
            what = f"{ms * 1e3:.1f} µs"
        noted(choice, ms)
        best = min(best, ms)
        progress(Progress(done, len(candidates), f"{named(choice)}: {what}", best, stop - clock()))
    if best == INF:
        raise RuntimeError(f"none of {tried} candidates ran")

    winner, final = _finals(candidates, times, best, timer, progress)
    return Found(winner, final[winner], final.get(candidates[0]), tried, dropped, resumed)


def _finals(
    candidates: Sequence[Choice], times: dict[Choice, float], best: float, timer: Timer,
    progress: Callable[[Progress], object],
) -> tuple[Choice, dict[Choice, float]]:  # fmt: skip
    """The winner among the default and those that come near the best, timed longer, and what each of them took."""
    default = candidates[0]
    near = sorted((c for c in candidates if times.get(c, INF) <= SLOWER * best), key=lambda c: times[c])[:FINALISTS]
    samples: dict[Choice, list[float]] = {c: [] for c in near}
    if times.get(default, INF) < INF:
        samples.setdefault(default, [])
    for turn in range(ROUNDS):
        progress(
            Progress(len(candidates), len(candidates), f"{len(samples)} finalists, {turn + 1} of {ROUNDS}", best, 0)
        )
        for choice, list_ in samples.items():
            list_.append(timer(choice, LONG))
    final = {c: statistics.median(ms) for c, ms in samples.items()}
    winner = min(final, key=lambda c: final[c])
    if default in final and final[winner] > TIE * final[default]:
        winner = default
    return winner, final


def _tile(choice: Choice) -> tuple[object, ...]:
    return choice[0], *choice[1][:3]


def named(choice: Choice) -> str:
    kernel, c = choice
    return f"{kernel} {c.BM}×{c.BN}×{c.BK} {c.warps}w {c.stages}s"
