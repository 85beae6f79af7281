"""Registers and shared memory that an asynchronous product of Hopper (`wgmma`) still reads when they are written again.

`wgmma` returns before it has read its operands. Until a wait that covers it, neither its accumulators nor the registers
that hold its left operand may be touched (PTX ISA, "wgmma.mma_async": anything else is undefined), and each warpgroup
waits for its own products only: what another one still reads in shared memory is free once a barrier follows its wait.
Compilers break the first rule where they leave products in flight over a loop's back edge (Triton issue 9433), and the
second with more than 4 warps (Triton issue 11047).

Read in the machine code, along every path; where paths meet, the worse counts. So a kernel without a finding is free of
both, but for what no machine code shows: that a copy brings data into a buffer which is being read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

OLDEST = 15  # groups behind which no wait can be asked for: the hardware counts fewer

# What a product in flight has hold of -> how many groups of products were committed since its own, at the least; -1:
# its group isn't yet. (register, "A") or (register, (first, count) of the accumulators); and (None, barred) for what it
# reads in shared memory, barred once a barrier has followed.
Flight = dict[tuple[int | None, object], int]


class State(NamedTuple):
    flight: Flight
    freed: bool  # some product was waited for behind such a barrier, and none has followed the wait


class Instruction(NamedTuple):
    address: str
    predicate: str  # "" or "@!P0"
    opcode: str
    operands: str

    def __str__(self) -> str:
        return " ".join(filter(None, (f"/*{self.address}*/", self.predicate, self.opcode, self.operands)))

    @property
    def conditional(self) -> bool:
        return self.predicate not in ("", "@PT", "@UPT")


def hazards(sass: str, warps: int = 4) -> list[str]:
    """What breaks the rules in one function, a line each; `warps` of a block, whose barriers guard shared memory.

    Blocks whose warpgroups hand buffers to each other by mbarriers (csrc/) ask with 4: the first rule alone.

    Raises:
        ValueError: an instruction or a jump that is not understood.
    """
    if "GMMA" not in sass:
        return []
    flow = Flow(sass)
    states: dict[Place, State] = {START: State({}, False)}
    found: dict[int, str] = {}
    waiting = [START]
    while waiting:
        place = waiting.pop()
        state, fault = _after(flow.code[place[0]], states[place], warps)
        if fault:
            found[place[0]] = fault
        for to in flow.after(place):
            known = states.get(to)
            joined = state if known is None else _joined(known, state)
            if joined != known:  # it was not known that this may hold there
                states[to] = joined
                waiting.append(to)
    return [f"{flow.code[i]}: {found[i]}" for i in sorted(found)]


def _joined(a: State, b: State) -> State:
    flight = dict(a.flight)
    for key, age in b.flight.items():
        flight[key] = min(age, flight.get(key, OLDEST))
    return State(flight, a.freed or b.freed)


def _after(op: Instruction, state: State, warps: int) -> tuple[State, str]:
    """What holds behind an instruction, and what it breaks."""
    if op.predicate in ("@!PT", "@!UPT"):
        return state, ""
    flight, new, fault = state.flight, state, ""
    if "GMMA" in op.opcode:
        new, fault = _product(op, state)
    elif op.opcode == "WARPGROUP.DEPBAR.LE":
        pending = int(op.operands.rpartition(" ")[2], 0)
        left = {key: age for key, age in flight.items() if age < pending}
        new = State(left, state.freed or (None, True) in flight)
    elif op.opcode.startswith("BAR.SYNC") and op.operands == "0x0" and not op.conditional:  # of all threads
        left = {key: age for key, age in flight.items() if key[0] is not None}
        ages = [age for key, age in flight.items() if key[0] is None]
        new = State(left | ({(None, True): min(ages)} if ages else {}), False)
    else:
        if warps > 4 and state.freed and re.match(r"LDGSTS|STS|UTMALDG|UBLKCP", op.opcode):
            fault = "writes shared memory that another warpgroup's product may still read: no barrier since the wait"
        touched = set(_registers(op)) if flight else ()
        if mine := [key for key in flight if key[0] in touched]:
            fault = _named(mine)
    return (_joined(state, new), fault) if op.conditional else (new, fault)


def _product(op: Instruction, state: State) -> tuple[State, str]:
    shape = re.search(r"GMMA\.\d+x(\d+)x\d+\.(F32|F16|S32)", op.opcode)
    operands = [text.strip() for text in op.operands.split(",")]
    if shape is None or not (to := re.fullmatch(r"R(\d+|Z)", operands[0])):
        raise ValueError(f"not understood: {op}")
    count = int(shape[1]) // (4 if shape[2] == "F16" else 2)
    first = 0 if to[1] == "Z" else int(to[1])  # RZ: no product, but the end of a group
    sums = set() if to[1] == "Z" else {(r, (first, count)) for r in range(first, first + count)}
    left = re.match(r"R(\d+)", operands[1])
    A = {(r, "A") for r in range(int(left[1]), int(left[1]) + 4)} if left else set()
    written, read = {r for r, _ in sums}, {r for r, _ in A}
    wrong = [  # the same sums again wait for each other in the hardware, and reading twice harms nobody
        key for key in state.flight
        if (key[0] in written and key not in sums) or (key[0] in read and key[1] != "A")
    ]  # fmt: skip
    flight: Flight = {**state.flight, **dict.fromkeys((*sums, *A, (None, False)), -1)}
    if "gsb0" in operands:  # the group ends here
        flight = {key: min(age + 1, OLDEST) for key, age in flight.items()}
    return State(flight, state.freed), _named(wrong)


def _named(keys: list[tuple[int | None, object]]) -> str:
    if not keys:
        return ""
    numbers = sorted({r for r, _ in keys if r is not None})
    what = "operand" if any(kind == "A" for _, kind in keys) else "accumulator"
    named = f"R{numbers[0]}" + (f" … R{numbers[-1]}" if len(numbers) > 1 else "")
    return f"touches {named}, {what} of a product that may not have been waited for"


def _registers(op: Instruction) -> Iterator[int]:
    """Every register that an instruction may read or write; some that it doesn't among them."""
    for i, text in enumerate(re.findall(r"\[[^\]]*\]|[^,\[]+", op.operands)):
        wide = 1 if text.startswith("[") else _width(op.opcode, i)
        for number, suffix in re.findall(r"(?<![\w.])R(\d+)((?:\.\w+)*)", text):
            yield from range(int(number), int(number) + (2 if ".64" in suffix else wide))


def _width(opcode: str, operand: int) -> int:
    """Registers of an operand, at most."""
    if re.match(r"(?:LD|ST)SM", opcode):
        return next((n for n in (4, 2) if opcode.endswith(f".{n}")), 1)
    if re.match(r"LD|ST|ATOM|RED", opcode):
        return next((n for mark, n in ((".256", 8), (".128", 4), (".64", 2)) if mark in opcode), 1)
    if "WIDE" in opcode:
        return 2 if operand in (0, 3) else 1
    if re.match(r"D(?:ADD|MUL|FMA|SETP|MNMX)|CS2R(?!\.32)|RET|BRX|JMX", opcode):
        return 2
    if "MMA" in opcode:
        return 4
    return 2 if re.search(r"\.[FSU]?64\b", opcode) and not opcode.startswith("SHF") else 1


LABEL = re.compile(r"\s*([.$\w]+):\s*$")
LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
# An instruction; where the calls that led to it return to; and where each convergence barrier lets its threads go on
Place = tuple[int, tuple[int, ...], tuple[tuple[str, int], ...]]

START: Place = (0, (), ())


class Flow:
    """The instructions of a function, and which may follow which."""

    def __init__(self, sass: str):
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for line in sass.splitlines():
            if label := LABEL.match(line):
                self.labels[label[1]] = len(self.code)
            elif found := LINE.match(line):
                self.code.append(Instruction(found[1], (found[2] or "").strip(), found[3], found[4]))
        self.meeting: dict[str, set[int]] = {}  # convergence barrier -> where it lets threads go on
        for op in self.code:
            if op.opcode.startswith("BSSY"):
                self.meeting.setdefault(op.operands.split(",")[0], set()).add(self._target(op))
        self._jumps = [self._jump(op) for op in self.code]

    def after(self, place: Place) -> list[Place]:
        i, calls, meeting = place
        op = self.code[i]
        kind, barrier = op.opcode.partition(".")[0], op.operands.split(",")[0].strip()
        targets, on = self._jumps[i]
        if kind == "BSSY":
            meeting = tuple(sorted({**dict(meeting), barrier: self._target(op)}.items()))
        elif kind == "BSYNC":
            targets = {dict(meeting)[barrier]} if barrier in dict(meeting) else self.meeting.get(barrier, set())
            meeting = tuple(pair for pair in meeting if pair[0] != barrier)  # else all behind is walked once for each
        found = [(i + 1, calls, meeting)] if on and i + 1 < len(self.code) else []
        if kind == "CALL":
            self._returns(i)
            return found + [(to, (*calls, i + 1), meeting) for to in targets]
        if kind == "RET":
            if not calls:
                raise ValueError(f"{op}: there is no call to return from")
            return [*found, (calls[-1], calls[:-1], meeting)]
        return found + [(to, calls, meeting) for to in targets if to < len(self.code)]

    def _jump(self, op: Instruction) -> tuple[set[int], bool]:
        """Where an instruction may jump to, and whether the next one may follow."""
        kind = op.opcode.partition(".")[0]
        if kind in ("BRA", "JMP"):
            return {self._target(op)}, op.conditional or not op.operands.startswith("`")
        if kind in ("BRX", "JMX"):
            return self._targets(op), op.conditional
        if kind == "CALL":
            return {self._target(op)}, op.conditional
        if kind == "WARPSYNC" and "`" in op.operands:
            return {self._target(op)}, True
        return set(), op.conditional or kind not in ("EXIT", "RET", "BPT")

    def _target(self, op: Instruction) -> int:
        name = re.search(r"`\(([^)]+)\)", op.operands)
        if name is None or name[1] not in self.labels:
            raise ValueError(f"{op}: it is not known where that leads")
        return self.labels[name[1]]

    def _targets(self, op: Instruction) -> set[int]:
        """Of a jump to one of several: nvdisasm lists them."""
        names = re.search(r'BRANCH_TARGETS ([^"]+)"', op.operands)
        if names is None or not set(names[1].split(",")) <= self.labels.keys():
            raise ValueError(f"{op}: it is not known where that leads")
        return {self.labels[name] for name in names[1].split(",")}

    def _returns(self, call: int) -> None:
        """A call returns behind itself: so says an instruction that brings its address to a register."""
        behind = f"0x{int(self.code[call].address, 16) + 16:x}"
        if not any(behind in re.findall(r"0x[0-9a-f]+", op.operands) for op in self.code):
            raise ValueError(f"{self.code[call]}: it is not known where that returns to")
