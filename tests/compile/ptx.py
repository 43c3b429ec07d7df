"""Runs PTX on the CPU: the program the GPU compiler made, on real inputs.

    program, launch = parse(ptx_text), read_launch(host_llvm_text)
    accesses = run(program, launch, [inputs..., output])     # numpy arrays

Nothing else executes the inline code of `pallas_kernels.mosaic` without a GPU: Pallas's
interpreter runs a stand-in for it, and registers and spills do not tell what it
computes.

One block of threads after another. A register is a uint64 array over the threads of a
block, so an instruction is a few numpy operations. Threads have their own counters:
those at the lowest address go first, those at a barrier wait, so branches and warps
that run ahead need no analysis of the program.

What is checked on the way, each a `Fault`: every access lies within one array and is
aligned, inputs are not written, every byte of an output is written exactly once, every
word of shared memory is written before it is read, and any two accesses to a word by
different threads, one of them a store, have a barrier between them (by vector clocks of
the warps: whatever the order here, the hardware's may be another). A barrier that can
never be passed is a `Fault` too. An instruction or form not written out below is
`Unsupported`, never skipped.

Source: PTX ISA 9.0. Results of `mma` are sums in float64, rounded once; the hardware's
order and rounding of a sum are its own.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

WARP = 32
SHARED_BASE = 1024
"""Where shared memory begins; addresses below belong to no array."""
_REGION = 40
"""Array i begins at (i + 1) << _REGION, far from every other one."""


class Fault(AssertionError):
    """The program does something that no kernel may do."""


class Unsupported(NotImplementedError):
    """The program uses an instruction that is not implemented here."""


def _demand(fine: Any, message: str) -> None:
    if not fine:
        raise Fault(message)


def _support(fine: Any, text: str) -> None:
    if not fine:
        raise Unsupported(text)


@dataclass(frozen=True)
class Instruction:
    """One instruction; `operands` are parsed by `_operand`."""

    text: str
    op: tuple[str, ...]
    operands: tuple[Any, ...]
    guard: tuple[str, bool] | None
    """Predicate register and the value it must have."""
    target: int = -1
    """Of a branch: an index into the instructions."""


@dataclass(frozen=True)
class Program:
    """The one entry of a PTX file."""

    parameters: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    labels: frozenset[int]
    """Indices that a branch may lead to."""

    def loops(self) -> list[range]:
        """Instructions from the target of a backward branch to the branch."""
        return [
            range(i.target, at + 1)
            for at, i in enumerate(self.instructions)
            if -1 < i.target <= at and not i.text.startswith("bra.uni")
        ]

    def contractions(self) -> list[str]:
        """Sums of products that ptxas may round once: no `.rn` says otherwise."""
        products, contracted = set(), []
        for i in self.instructions:
            if i.op in (("add", "f32"), ("sub", "f32")):
                if any(o[1] in products for o in i.operands[1:] if o[0] == "reg"):
                    contracted.append(i.text)
            for name in _written(i):
                products.discard(name)
                if i.op == ("mul", "f32"):
                    products.add(name)
        return contracted


def _written(i: Instruction) -> list[str]:
    if i.op[0] in ("st", "bar", "bra", "ret", "fence", "prefetch", "mbarrier"):
        return []
    first = i.operands[0]
    return [o[1] for o in (first[1] if first[0] == "vec" else [first])]


@dataclass(frozen=True)
class Launch:
    """How the host starts the kernel."""

    grid: tuple[int, int, int]
    threads: int
    shared: int
    """Bytes of dynamic shared memory."""
    parameters: tuple[int, ...]
    """For each parameter of the kernel, the array it points to."""


def read_launch(host: str) -> Launch:
    """Reads the launch from the host code (LLVM) that goes with the PTX."""

    def found(pattern: str) -> list:
        return re.findall(pattern.replace("%N", r"%(\d+)"), host)

    (array,) = set(found(r"getelementptr ptr, ptr %N, i32 1\n"))
    offsets = dict(found(rf"%N = getelementptr ptr, ptr %{array}, i32 (\d+)"))
    offsets[array] = 0
    values = {name: int(offsets[at]) for name, at in found("%N = load ptr, ptr %N")}
    slots = dict(found(r"%N = getelementptr {.*}, ptr %\d+, i32 0, i32 (\d+)"))
    stores = [pair for pair in found("store ptr %N, ptr %N") if pair[0] in values]
    parameters = {int(slots[slot]): values[value] for value, slot in stores}
    (call,) = found(r"call .*@mosaic_gpu_(?:build_kernel_spec|launch_kernel)\((.*)\)")
    x, y, z, *rest, shared = map(int, re.findall(r"i32 (\d+)", call)[:10])
    one = rest[:3] == [0, 0, 0] and rest[4:] == [1, 1]
    _support(one, f"clusters, or threads in more than one dimension: {call}")
    order = tuple(parameters[i] for i in range(len(parameters)))
    return Launch((x, y, z), rest[3], shared, order)


# --------------------------------------------------------------------------- parsing


def parse(text: str) -> Program:
    """Reads a PTX file with one entry and no other function."""
    (match,) = re.finditer(
        r"\.entry \w+\((.*?)\)[^{]*\{(.*?)^\}", text, re.DOTALL | re.MULTILINE
    )
    parameters = tuple(re.findall(r"(\w+)\s*(?:,|$)", match[1].strip()))
    lines = (re.sub(r"//.*", "", line).strip() for line in match[2].splitlines())
    body = "\n".join(
        line for line in lines if not re.match(r"\.(loc|file|section|pragma)\b", line)
    )
    drafts: list[tuple[str, tuple[int, ...]]] = []
    labels: dict[tuple[int, str], int] = {}
    local: dict[int, set[str]] = {0: set()}
    scope: tuple[int, ...] = (0,)
    for statement in body.split(";"):
        rest = statement.strip()
        while rest:
            if rest[0] == "{":
                scope = (*scope, len(local))
                local[scope[-1]] = set()
                rest = rest[1:].lstrip()
            elif rest[0] == "}":
                scope, rest = scope[:-1], rest[1:].lstrip()
            elif label := re.match(r"([\w$]+):(?!:)\s*", rest):
                labels[scope[-1], label[1]] = len(drafts)
                rest = rest[label.end() :]
            elif rest.startswith(".reg"):
                local[scope[-1]].update(re.findall(r"(\w+)(?:,|$)", rest.split()[-1]))
                break
            elif rest.startswith(".shared"):
                dynamic = re.search(r"__dynamic_shmem__\d*$", rest)
                _support(dynamic, f"static shared memory: {rest}")
                break
            else:
                drafts.append((re.sub(r"\s+", " ", rest), scope))
                break

    def named(name: str, where: tuple[int, ...]) -> str:
        inner = [s for s in where[1:] if name in local[s]]
        return f"{name}#{inner[-1]}" if inner else name

    instructions = []
    for draft, where in drafts:
        guard, words = None, draft
        if match := re.match(r"@(!?)(\S+) ", draft):
            guard = (named(match[2], where), not match[1])
            words = draft[match.end() :]
        op, _, tail = words.partition(" ")
        parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,\s]*", tail)
        target = -1
        if op.startswith("bra"):
            target = next(
                labels[s, parts[0]] for s in reversed(where) if (s, parts[0]) in labels
            )
            parts = []
        instructions.append(
            Instruction(
                words,
                tuple(re.sub("::(cta|entry)", "", op).split(".")),
                tuple(_operand(p, lambda n, w=where: named(n, w)) for p in parts),
                guard,
                target,
            )
        )
    targets = frozenset(i.target for i in instructions if i.target >= 0)
    return Program(parameters, tuple(instructions), targets)


def _operand(text: str, named: Callable[[str], str]) -> tuple:
    if text[0] == "{":
        return "vec", [_operand(t.strip(), named) for t in text[1:-1].split(",")]
    if text[0] == "[":
        match = re.fullmatch(r"\[([^+\s]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        return "mem", _operand(match[1], named), int(match[2] or 0)
    if "|" in text:
        return "vec", [_operand(t, named) for t in text.split("|")]
    if match := re.fullmatch(r"0[fdFD]([0-9a-fA-F]+)", text):
        return "imm", int(match[1], 16)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return "imm", int(text.rstrip("U"), 0)
    return "reg", named(text)


# ------------------------------------------------------------------------- execution


@dataclass
class Access:
    """The memory accesses of one instruction, the worst of all times and warps."""

    text: str
    kind: str
    """ld, st or prefetch."""
    array: int | None
    """Which array; None for shared memory."""
    width: int
    """Bytes of a thread."""
    used: float = 1.0
    """Global: the part of the 32-byte sectors touched that was asked for."""
    ways: int = 1
    """Shared: words that one bank has to serve in turn, to a warp that loads 4 bytes a
    thread, to the half of one that loads 8, or to the quarter that loads 16."""


@dataclass
class _Barrier:
    expected: int
    pending: int
    phase: int
    arrived: np.ndarray
    """What has happened before the arrivals of this phase: an epoch for each warp."""
    passed: np.ndarray
    """The same, of phases that are complete."""


def run(
    program: Program,
    launch: Launch,
    arrays: Sequence[np.ndarray],
    updated: Sequence[int] = (),
) -> list[Access]:
    """Runs a kernel on the arrays the host passes; returns its accesses to memory.

    The arrays are inputs and then the one output, which is written in word. Inputs
    whose numbers are in `updated` may be written too; races on them are not seen.
    Raises `Fault` where the kernel does what none may do, `Unsupported` at an
    instruction that is not implemented here.
    """
    memory = _Memory(arrays, updated)
    accesses: dict[tuple[int, int | None], Access] = {}
    x, y, z = launch.grid
    with np.errstate(all="ignore"):
        for block in itertools.product(range(z), range(y), range(x)):
            _Block(program, launch, memory, accesses, block[::-1]).run()
    memory.finish()
    return list(accesses.values())


class _Memory:
    """The arrays, as bytes at their addresses."""

    def __init__(self, arrays: Sequence[np.ndarray], updated: Sequence[int] = ()):
        self.updated = {number: arrays[number] for number in updated}
        self.sizes = [a.nbytes for a in arrays]
        self.bytes = []
        for a in arrays:
            padded = np.zeros(-(-a.nbytes // 16) * 16, np.uint8)
            padded[: a.nbytes] = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
            self.bytes.append(padded)
        self.output = arrays[-1]
        self.written = np.zeros(len(self.bytes[-1]), np.int32)

    def locate(self, address: np.ndarray, width: int, text: str) -> tuple:
        """Returns the one array of all addresses, and the offsets in it."""
        (array,) = set((address >> np.uint64(_REGION)).tolist()) or {0}
        array -= 1
        offset = (address & np.uint64((1 << _REGION) - 1)).astype(np.int64)
        _demand(0 <= array < len(self.sizes), f"address of no array: {text}")
        size = self.sizes[array]
        if (beyond := (offset + width).max(initial=0) - size) > 0:
            array_and_size = f"array {array} ({size} bytes)"
            raise Fault(f"out of bounds by {beyond} bytes of {array_and_size}: {text}")
        _demand((offset % width == 0).all(), f"misaligned: {text}")
        return array, offset

    def finish(self) -> None:
        size = self.sizes[-1]
        times = np.unique(self.written[:size]).tolist()
        _demand(
            times in ([], [1]), f"bytes of the output are written {times} times each"
        )
        for number, array in {-1: self.output, **self.updated}.items():
            flat = self.bytes[number][: array.nbytes].view(array.dtype)
            array[...] = flat.reshape(array.shape)


class _Block:
    """One block of threads."""

    def __init__(
        self, program: Program, launch: Launch, memory: _Memory, accesses: dict, block
    ):
        self.program, self.launch = program, launch
        self.memory, self.accesses = memory, accesses
        n = self.n = launch.threads
        self.thread = np.arange(n)
        self.warp = self.thread // WARP
        warps = -(-n // WARP)
        constants = {"%laneid": self.thread % WARP, "%tid.y": 0, "%tid.z": 0}
        constants |= {"%tid.x": self.thread, "%warpid": self.warp, "%ntid.x": n}
        for axis, at, size in zip("xyz", block, launch.grid, strict=True):
            constants |= {f"%ctaid.{axis}": at, f"%nctaid.{axis}": size}
        shared = ("__dynamic_shmem__", "__dynamic_shmem__0")
        constants |= dict.fromkeys(shared, SHARED_BASE)
        self.r: dict[str, np.ndarray] = {
            k: np.broadcast_to(np.asarray(v, np.uint64), (n,))
            for k, v in constants.items()
        }
        self.at = np.zeros(n, np.int64)
        self.done = np.zeros(n, bool)
        self.blocked = np.zeros(n, bool)
        self.waiting: dict[int, list[np.ndarray]] = {}
        self.mbarriers: dict[int, _Barrier] = {}
        self.mwaiting: list[tuple[np.ndarray, int, int]] = []
        words = -(-launch.shared // 16) * 4
        self.shared = np.zeros(words, np.uint32)
        self.writer = np.full(words, -1)
        self.write_epoch = np.zeros(words, np.int64)
        self.read_epoch = np.zeros((words, warps), np.int32)
        self.epoch = np.ones(warps, np.int64)
        self.seen = np.zeros((warps, warps), np.int64)
        """Of each warp: up to which epoch of each other all is known to be done."""
        self.active = np.ones(n, bool)

    def run(self) -> None:
        instructions, labels = self.program.instructions, self.program.labels
        while not self.done.all():
            runnable = ~(self.done | self.blocked)
            if not runnable.any():
                at = np.unique(self.at[self.blocked] - 1).tolist()
                texts = [instructions[i].text for i in at]
                raise Fault(f"threads wait for ever: {texts}")
            here = self.at[runnable].min()
            mask = runnable & (self.at == here)
            while True:
                i = instructions[here]
                self.active = mask
                if i.guard is not None:
                    predicate = self._read(i.guard[0]).astype(bool)
                    self.active = mask & (predicate == i.guard[1])
                if i.op[0] in ("bra", "ret", "exit"):
                    self.at[mask] = here + 1
                    self.at[self.active] = i.target
                    if i.op[0] != "bra":
                        self.done |= self.active
                    break
                self.at[mask] = here + 1
                self.here = here
                if self.active.any():
                    self._execute(i)
                here += 1
                waits = i.op[0] in ("bar", "mbarrier") or self.blocked.any()
                if waits or here in labels:
                    break

    def _execute(self, i: Instruction) -> None:
        name = i.op[0]
        if name in _ARITHMETIC:
            self._arithmetic(i, _ARITHMETIC[name])
        elif name in _BITWISE:
            self._bitwise(i, _BITWISE[name])
        else:
            handler = getattr(self, "_" + name, None)
            _support(handler, f"unknown instruction: {i.text}")
            handler(i)

    # Values.

    def _read(self, name: str) -> np.ndarray:
        _demand(name in self.r, f"register read before it is written: {name}")
        return self.r[name]

    def u(self, operand: tuple, bits: int) -> np.ndarray:
        """An operand as unsigned integers."""
        mask = (1 << bits) - 1
        if operand[0] == "imm":
            return np.full(self.n, operand[1] & mask, np.uint64)
        _support(operand[0] == "reg", f"operand {operand}")
        return self._read(operand[1]) & np.uint64(mask)

    def s(self, operand: tuple, bits: int) -> np.ndarray:
        """An operand as signed integers, int64."""
        return _signed(self.u(operand, bits), bits)

    def number(self, operand: tuple, kind: str) -> np.ndarray:
        """An operand as integers of a type."""
        return (self.s if kind[0] == "s" else self.u)(operand, _bits(kind))

    def f(self, operand: tuple) -> np.ndarray:
        """An operand as float32."""
        return self.u(operand, 32).astype(np.uint32).view(np.float32)

    def put(self, operand: tuple, value: np.ndarray, bits: int = 64) -> None:
        """Writes the active threads' registers."""
        if value.dtype == np.float32:
            value = value.view(np.uint32)
        if value.dtype != np.uint64:
            value = value.astype(np.int64).view(np.uint64)
        value = value & np.uint64((1 << bits) - 1)
        name = operand[1]
        if name == "_":
            return
        if not self.active.all():
            old = self.r.get(name)
            value = np.where(self.active, value, 0 if old is None else old)
            value = value.astype(np.uint64)
        self.r[name] = value

    # Integers, bits and predicates.

    def _mov(self, i: Instruction) -> None:
        bits = _bits(i.op[-1])
        out, value = i.operands
        if value[0] == "vec":
            each = bits // len(value[1])
            parts = [
                self.u(v, each) << np.uint64(k * each) for k, v in enumerate(value[1])
            ]
            self.put(out, np.bitwise_or.reduce(parts), bits)
        elif out[0] == "vec":
            each = bits // len(out[1])
            joined = self.u(value, bits)
            for k, o in enumerate(out[1]):
                self.put(o, joined >> np.uint64(k * each), each)
        else:
            self.put(out, self.u(value, bits), bits)

    def _arithmetic(self, i: Instruction, compute: Callable[..., Any]) -> None:
        out, *values = i.operands
        kind = i.op[-1]
        if kind == "f32":
            _support(set(i.op[1:-1]) <= {"rn"}, i.text)
            self.put(out, compute(*(self.f(v) for v in values)), 32)
        elif kind[0] in "us" and len(i.op) == 2:
            # Modulo 2^64, whose low bits are those of the sum modulo 2^32.
            bits = _bits(kind)
            self.put(out, compute(*(self.u(v, bits) for v in values)), bits)
        else:
            raise Unsupported(i.text)

    def _mul(self, i: Instruction) -> None:
        if i.op[-1] == "f32":
            return self._arithmetic(i, np.multiply)
        if i.op == ("mul", "bf16x2"):
            a, b = (
                self.u(o, 32).astype(np.uint32).view(_WIDE["bf16"])
                for o in i.operands[1:]
            )
            return self.put(i.operands[0], (a * b).view(np.uint32), 32)
        self.put(i.operands[0], *self._product(i))

    def _mad(self, i: Instruction) -> None:
        product, bits = self._product(i)
        self.put(i.operands[0], product + self.u(i.operands[3], bits), bits)

    def _product(self, i: Instruction) -> tuple[np.ndarray, int]:
        _, part, kind = i.op
        bits = _bits(kind)
        _support(part == "lo" or (part in ("wide", "hi") and bits != 64), i.text)
        a, b = (self.number(o, kind) for o in i.operands[1:3])
        product = a * b
        if part == "hi":
            product = product >> product.dtype.type(bits)
        return product.view(np.uint64), 2 * bits if part == "wide" else bits

    def _fma(self, i: Instruction) -> None:
        _support(i.op in (("fma", "rn", "f32"), ("fma", "rm", "f32")), i.text)
        a, b, c = (self.f(o).astype(np.float64) for o in i.operands[1:])
        value = _rounded_once(a * b, c)
        if i.op[1] == "rm":  # towards minus infinity
            below = np.nextafter(value, np.float32(-np.inf))
            value = np.where(value > a * b + c, below, value)
        self.put(i.operands[0], value, 32)

    # Within two units of the last place on the hardware; here rounded once.

    def _approximate(self, i: Instruction, compute: Callable[..., Any]) -> None:
        values = (self.f(o).astype(np.float64) for o in i.operands[1:])
        with np.errstate(all="ignore"):
            value = np.asarray(compute(*values)).astype(np.float32)
        self.put(i.operands[0], value, 32)

    def _div(self, i: Instruction) -> None:
        _support(i.op in (("div", "full", "f32"), ("div", "rn", "f32")), i.text)
        self._approximate(i, np.divide)

    def _ex2(self, i: Instruction) -> None:
        _support(i.op[:2] == ("ex2", "approx") and i.op[-1] == "f32", i.text)
        self._approximate(i, np.exp2)

    def _rcp(self, i: Instruction) -> None:
        _support(i.op == ("rcp", "approx", "ftz", "f32"), i.text)
        self._approximate(i, lambda x: 1 / x)

    def _rsqrt(self, i: Instruction) -> None:
        _support(i.op == ("rsqrt", "approx", "f32"), i.text)
        self._approximate(i, lambda x: 1 / np.sqrt(x))

    def _extreme(self, i: Instruction, exact: Any, number: Any) -> None:
        kind, how = i.op[-1], i.op[1:-1]
        if kind == "f32" and how in ((), ("NaN",)):
            compare = exact if how else number
            value = compare(self.f(i.operands[1]), self.f(i.operands[2]))
            if how and np.isnan(value).any():
                value = np.where(np.isnan(value), _NAN, value)
        else:
            _support(kind[0] in "us" and not how, i.text)
            value = exact(*(self.number(o, kind) for o in i.operands[1:3]))
        self.put(i.operands[0], value, _bits(kind))

    def _max(self, i: Instruction) -> None:
        self._extreme(i, np.maximum, np.fmax)

    def _min(self, i: Instruction) -> None:
        self._extreme(i, np.minimum, np.fmin)

    def _shl(self, i: Instruction) -> None:
        bits = _bits(i.op[-1])
        by = np.minimum(self.u(i.operands[2], 32), np.uint64(63))
        value = self.u(i.operands[1], bits) << by
        self.put(i.operands[0], np.where(by < bits, value, np.uint64(0)), bits)

    def _shr(self, i: Instruction) -> None:
        bits = _bits(i.op[-1])
        by = np.minimum(self.u(i.operands[2], 32), np.uint64(63))
        if i.op[-1][0] == "s":
            value = self.s(i.operands[1], bits) >> by.astype(np.int64)
        else:
            value = np.where(by < bits, self.u(i.operands[1], bits) >> by, np.uint64(0))
        self.put(i.operands[0], value, bits)

    def _bfe(self, i: Instruction) -> None:
        _support(i.op == ("bfe", "u32"), i.text)
        value, start, count = (self.u(o, 32) for o in i.operands[1:])
        _support((start + count <= 32).all(), i.text)
        mask = (np.uint64(1) << count) - np.uint64(1)
        self.put(i.operands[0], value >> start & mask, 32)

    def _bitwise(self, i: Instruction, compute: Callable[..., Any]) -> None:
        bits = _bits(i.op[-1])
        values = (self.u(o, bits) for o in i.operands[1:])
        self.put(i.operands[0], compute(*values), bits)

    def _setp(self, i: Instruction) -> None:
        compare, *join, kind = i.op[1:]
        known = kind != "f32" and i.operands[0][0] != "vec" and compare in _COMPARE
        _support(known, i.text)
        value = _COMPARE[compare](*(self.number(o, kind) for o in i.operands[1:3]))
        if join:
            other = self.u(i.operands[3], 1).astype(bool)
            value = {"and": np.logical_and, "or": np.logical_or}[join[0]](value, other)
        self.put(i.operands[0], value, 1)

    def _selp(self, i: Instruction) -> None:
        bits = _bits(i.op[-1])
        a, b = (self.u(o, bits) for o in i.operands[1:3])
        self.put(i.operands[0], np.where(self.u(i.operands[3], 1) == 1, a, b), bits)

    def _cvt(self, i: Instruction) -> None:
        *how, to, of = i.op[1:]
        narrow = to.removesuffix("x2")
        if how == ["rn"] and of == "f32" and narrow in _WIDE:
            parts = [_narrow(self.f(o), _WIDE[narrow]) for o in i.operands[1:]]
            value = parts[0]
            if len(parts) == 2:
                value = value << np.uint64(16) | parts[1]
            self.put(i.operands[0], value, 16 * len(parts))
        elif (how, to, of) == (["sat"], "f32", "f32"):
            value = np.nan_to_num(self.f(i.operands[1]), nan=0.0)
            self.put(i.operands[0], np.clip(value, 0, 1).astype(np.float32), 32)
        elif not how and to == "f32" and of in _WIDE:
            value = self.u(i.operands[1], 16).astype(np.uint16).view(_WIDE[of])
            self.put(i.operands[0], value.astype(np.float32), 32)
        else:
            _support(not how and to[0] in "us" and of[0] in "us", i.text)
            self.put(i.operands[0], self.number(i.operands[1], of), _bits(to))

    def _cvta(self, i: Instruction) -> None:
        _support(i.op == ("cvta", "to", "global", "u64"), i.text)
        self.put(i.operands[0], self.u(i.operands[1], 64))

    # Memory.

    def _ld(self, i: Instruction) -> None:
        if i.op[1] == "param":
            at = self.program.parameters.index(i.operands[1][1][1])
            address = (self.launch.parameters[at] + 1) << _REGION
            return self.put(i.operands[0], np.full(self.n, address, np.uint64))
        self._move(i, i.operands[0], i.operands[1])

    def _st(self, i: Instruction) -> None:
        self._move(i, i.operands[1], i.operands[0])

    def _move(self, i: Instruction, registers: tuple, memory: tuple) -> None:
        names = registers[1] if registers[0] == "vec" else [registers]
        rest = [s for s in i.op[1:-1] if s not in ("global", "shared", "v2", "v4")]
        bits = _bits(i.op[-1])
        _support(not rest and f"v{len(names)}" in (*i.op, "v1"), i.text)
        width = bits // 8 * len(names)
        load = i.op[0] == "ld"
        active = np.flatnonzero(self.active)
        address = self._address(memory)[active]
        if "shared" in i.op:
            view, at, array = self.shared, self._shared(i, address, width), None
            self._ordered(i, at, len(names), active, load)
        else:
            array, offset = self.memory.locate(address, width, i.text)
            view = self.memory.bytes[array].view(f"u{bits // 8}")
            at = offset // (bits // 8)
            self._sectors(i, array, offset, width, active)
            if array == len(self.memory.sizes) - 1:
                _demand(not load, f"the output is read: {i.text}")
                for k in range(width):
                    np.add.at(self.memory.written, offset + k, 1)
            elif array not in self.memory.updated:
                _demand(load, f"input {array} is written: {i.text}")
        for k, name in enumerate(names):
            if load:
                value = np.zeros(self.n, np.uint64)
                value[active] = view[at + k]
                self.put(name, value)
            else:
                view[at + k] = self.u(name, bits)[active]

    def _address(self, memory: tuple) -> np.ndarray:
        _, base, offset = memory
        return self.u(base, 64) + np.uint64(offset & (2**64 - 1))

    def _shared(self, i: Instruction, address: np.ndarray, width: int) -> np.ndarray:
        """Addresses in shared memory as indices of words."""
        offset = address.astype(np.int64) - SHARED_BASE
        inside = (offset >= 0) & (offset + width <= self.launch.shared)
        _demand(inside.all(), f"outside of shared memory: {i.text}")
        _demand((offset % width == 0).all(), f"misaligned: {i.text}")
        _support(width % 4 == 0, f"part of a word of shared memory: {i.text}")
        return offset // 4

    def _ordered(self, i: Instruction, first, count: int, threads, load: bool) -> None:
        """Faults on an access that no barrier orders after an earlier one."""
        shared = f"shared memory: {i.text}"
        warps = self.warp[threads]
        if load:
            # Words of `count` are served to so many parts of a warp in turn.
            part = warps * count + threads % WARP * count // WARP
            words = (first[:, None] + np.arange(count)).reshape(-1)
            pairs = np.unique(np.repeat(part, count) << 40 | words)
            queue = np.bincount((pairs >> 40) * WARP + (pairs & (WARP - 1)))
            access = self._access(i, None, 4 * count)
            access.ways = max(access.ways, int(queue.max()))
        for k in range(count):
            at = first + k
            writer = self.writer[at]
            written = not load or (writer >= 0).all()
            _demand(written, f"read before it is written, {shared}")
            known = self.seen[warps, writer // WARP] >= self.write_epoch[at]
            known |= (writer == threads) | (writer < 0)
            _demand(known.all(), f"race with an earlier store to {shared}")
            if load:
                self.read_epoch[at, warps] = self.epoch[warps]
                continue
            late = self.read_epoch[at] > self.seen[warps]
            late[np.arange(len(at)), warps] = False
            _demand(not late.any(), f"race with an earlier load from {shared}")
            self.writer[at], self.write_epoch[at] = threads, self.epoch[warps]
            alone = (self.writer[at] == threads).all()
            _demand(alone, f"two threads store to one word of {shared}")

    def _sectors(self, i: Instruction, array: int, offset, width: int, threads) -> None:
        keys = self.warp[threads] << 40
        sectors = np.unique(keys | offset >> 5) >> 40
        units = np.unique(keys | offset // width) >> 40
        warps = np.unique(sectors)
        bins = (np.bincount(units)[warps] * width, np.bincount(sectors)[warps] * 32)
        access = self._access(i, array, width)
        access.used = min(access.used, float((bins[0] / bins[1]).min()))

    def _access(self, i: Instruction, array: int | None, width: int) -> Access:
        access = Access(i.text, i.op[0], array, width)
        return self.accesses.setdefault((self.here, array), access)

    def _prefetch(self, i: Instruction) -> None:
        _support(i.op == ("prefetch", "global", "L2"), i.text)
        address = self._address(i.operands[0])[self.active]
        array, _ = self.memory.locate(address, 1, i.text)
        self._access(i, array, 1)

    # Warps and barriers.

    def _whole_warps(self, i: Instruction) -> None:
        count = np.count_nonzero(self.active.reshape(-1, WARP), axis=1)
        whole = np.isin(count, (0, WARP)).all()
        _demand(whole, f"not all lanes of a warp arrive: {i.text}")

    def _elect(self, i: Instruction) -> None:
        _support(i.operands[1] == ("imm", -1), i.text)
        self._whole_warps(i)
        lane, leader = i.operands[0][1]
        self.put(lane, np.zeros(self.n, np.uint64))
        self.put(leader, self.thread % WARP == 0, 1)

    def _shfl(self, i: Instruction) -> None:
        out, value, lane, clamp, members = i.operands
        kinds = [("shfl", "sync", kind, "b32") for kind in ("idx", "bfly")]
        _support(i.op in kinds and out[0] != "vec", i.text)
        _support((clamp, members) == (("imm", 31), ("imm", -1)), i.text)
        self._whole_warps(i)
        other = (self.u(lane, 32) & np.uint64(31)).astype(np.int64)
        if i.op[2] == "bfly":
            other = self.thread % WARP ^ other
        self.put(out, self.u(value, 32)[self.warp * WARP + other], 32)

    def _mma(self, i: Instruction) -> None:
        *how, kind, other, _ = i.op
        shape = ["mma", "sync", "aligned", "m16n8k16", "row", "col", "f32"]
        known = how == shape and kind == other and i.op[-1] == "f32" and kind in _WIDE
        _support(known, i.text)
        self._whole_warps(i)
        out, a, b, c = (o[1] for o in i.operands)
        warps = self.n // WARP

        def halves(operand: tuple) -> np.ndarray:
            words = self.u(operand, 32).astype(np.uint32)
            return words.view(_WIDE[kind]).astype(np.float64).reshape(warps, WARP, 2)

        # PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
        group, quad = np.divmod(np.arange(WARP), 4)
        left = np.zeros((warps, 16, 16))
        for k, operand in enumerate(a):
            row, column = group + 8 * (k % 2), 2 * quad + 8 * (k // 2)
            for j in range(2):
                left[:, row, column + j] = halves(operand)[:, :, j]
        right = np.zeros((warps, 16, 8))
        for k, operand in enumerate(b):
            for j in range(2):
                right[:, 2 * quad + 8 * k + j, group] = halves(operand)[:, :, j]
        product = left @ right
        for k, (operand, target) in enumerate(zip(c, out, strict=True)):
            part = product[:, group + 8 * (k // 2), 2 * quad + k % 2].reshape(-1)
            total = part + self.f(operand).astype(np.float64)
            self.put(target, total.astype(np.float32), 32)

    def _fence(self, i: Instruction) -> None:
        """Orders nothing here: stores are visible at once."""

    def _release(self, threads: np.ndarray) -> np.ndarray:
        """What is done when these threads arrive; their next epoch begins."""
        warps = np.unique(self.warp[threads])
        before = self.seen[warps].max(0)
        before[warps] = np.maximum(before[warps], self.epoch[warps])
        self.epoch[warps] += 1
        return before

    def _acquire(self, threads: np.ndarray, before: np.ndarray) -> None:
        warps = np.unique(self.warp[threads])
        self.seen[warps] = np.maximum(self.seen[warps], before)

    def _bar(self, i: Instruction) -> None:
        _support(i.op == ("bar", "sync"), i.text)
        self._whole_warps(i)
        number = self.u(i.operands[0], 32)
        count = self.u(i.operands[1], 32) if len(i.operands) == 2 else None
        for which in np.unique(number[self.active]).tolist():
            threads = np.flatnonzero(self.active & (number == which))
            expected = self.n if count is None else int(count[threads[0]])
            fine = which <= 15 and expected % WARP == 0
            _demand(fine, f"barrier {which} for {expected} threads: {i.text}")
            waiting = self.waiting.setdefault(which, [])
            waiting.append(threads)
            self.blocked[threads] = True
            together = np.concatenate(waiting)
            arrivals = f"{len(together)} threads arrive for {expected}: {i.text}"
            _demand(len(together) <= expected, arrivals)
            if len(together) == expected:
                self.blocked[together] = False
                self._acquire(together, self._release(together))
                waiting.clear()

    def _mbarrier(self, i: Instruction) -> None:
        what = i.op[1]
        memory = next(o for o in i.operands if o[0] == "mem")
        address = self._address(memory)
        active = np.flatnonzero(self.active)
        at = self._shared(i, address[active], 8)
        for word in np.unique(at).tolist():
            threads = active[at == word]
            words = np.full(len(threads), word)
            self._ordered(i, words, 2, threads, load=what != "init")
            warps = len(self.epoch)
            if what == "init" and len(threads) == 1:
                count = int(self.u(i.operands[1], 32)[threads[0]])
                clocks = np.zeros(warps, np.int64), np.zeros(warps, np.int64)
                self.mbarriers[word] = _Barrier(count, count, 0, *clocks)
                self.shared[word : word + 2] = 0
            elif what == "arrive" and i.operands[0] == ("reg", "_"):
                self._arrive(i, self.mbarriers[word], threads)
            elif what in ("try_wait", "test_wait") and "parity" in i.op:
                # A wait that may time out is one that does not: the loop around it
                # would only ask again.
                (parity,) = set(self.u(i.operands[2], 32)[threads].tolist())
                self.put(i.operands[0], np.ones(self.n, np.uint64), 1)
                self.blocked[threads] = True
                self.mwaiting.append((threads, word, parity))
            else:
                raise Unsupported(i.text)
        self._pass()

    def _arrive(self, i: Instruction, barrier: _Barrier, threads: np.ndarray) -> None:
        rest = i.operands[2:]
        _support(rest in ((), (("imm", 1),)), i.text)
        fine = len(threads) <= barrier.pending
        _demand(fine, f"more arrivals than the barrier expects: {i.text}")
        barrier.arrived = np.maximum(barrier.arrived, self._release(threads))
        barrier.pending -= len(threads)
        if barrier.pending == 0:
            barrier.pending = barrier.expected
            barrier.phase += 1
            barrier.passed = np.maximum(barrier.passed, barrier.arrived)

    def _pass(self) -> None:
        still = []
        for threads, word, parity in self.mwaiting:
            # A wait for parity p is over once a phase of that parity is.
            if self.mbarriers[word].phase % 2 != parity:
                self.blocked[threads] = False
                self._acquire(threads, self.mbarriers[word].passed)
            else:
                still.append((threads, word, parity))
        self.mwaiting = still


_NAN = np.array(0x7FFFFFFF, np.uint32).view(np.float32)
_COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
_COMPARE |= {"gt": np.greater, "ge": np.greater_equal}
_COMPARE |= {"lo": np.less, "ls": np.less_equal}
_COMPARE |= {"hi": np.greater, "hs": np.greater_equal}
_ARITHMETIC = {"add": np.add, "sub": np.subtract, "neg": np.negative}
_BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or}
_BITWISE |= {"xor": np.bitwise_xor, "not": np.bitwise_not}
_WIDE = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


def _bits(kind: str) -> int:
    if kind == "pred":
        return 1
    _support(re.fullmatch(r"[busf](8|16|32|64)", kind), f"type .{kind}")
    return int(kind[1:])


def _signed(value: np.ndarray, bits: int) -> np.ndarray:
    shift = np.int64(64 - bits)
    return value.view(np.int64) << shift >> shift


def _narrow(value: np.ndarray, dtype: Any) -> np.ndarray:
    bits = value.astype(dtype).view(np.uint16)
    return np.where(np.isnan(value), np.uint64(0x7FFF), bits.astype(np.uint64))


def _rounded_once(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float32 nearest to the exact a + b of two float64.

    The float64 sum is rounded to odd (its last bit says whether anything was lost), and
    a sum rounded to odd with two bits to spare rounds as the exact one does.
    """
    total = a + b
    part = total - a
    lost = (a - (total - part)) + (b - part)
    bits = total.view(np.int64)
    inexact = (lost != 0) & np.isfinite(total) & (bits & 1 == 0)
    away = (lost > 0) == (total > 0)
    odd = np.where(inexact, np.where(away, bits + 1, bits - 1), bits)
    return odd.view(np.float64).astype(np.float32)
