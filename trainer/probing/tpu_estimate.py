"""Memory and time of a program compiled for a TPU, read from the compiler's own output.

The compiler writes an estimate of its cycles at most instructions. Those of convolutions and matrix
products are credible; what works element by element on bfloat16 it takes for 2.5 to 4 times slower
than the memory it moves. So there are two times: the raw sum, and an adjusted one in which such
instructions cost what their bytes cost at 90% of the HBM's bandwidth, if that is less. The truth
lies between. Gather, scatter, sort, random numbers and collectives have no estimate: the adjusted
time counts the bytes that they move only, the raw one nothing.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trainer.probing.tpu_compiler import Topology

_USABLE_BANDWIDTH = 0.9
_LEAST_SECONDS = 2e-6  # of an instruction
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
# What has no estimate, and what makes a fusion have none. Others are only worth telling from some
# bytes up: there are many scalars.
_SLOW = (
    "gather",
    "scatter",
    "sort",
    "rng-bit-generator",
    "all-reduce",
    "dynamic-update-slice",
    "custom-call",
)
_SMALL = 1 << 20


@dataclass(frozen=True)
class Estimate:
    """Cost of one program on one device.

    Attributes:
      flop: multiplications and additions, as the compiler counts them.
      hbm: bytes needed: arguments, results that don't take an argument's place, temporaries, code.
      raw, adjusted: seconds; see this module.
      roofline: seconds of `flop` in the matrix units alone.
      unestimated: how often which kind of instruction runs that has no estimate.
      largest: seconds, kind and origin of the instructions that take longest.
    """

    flop: float
    hbm: int
    raw: float
    adjusted: float
    roofline: float
    unestimated: dict[str, int]
    largest: list[tuple[float, str, str]]


@dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    text: str  # what follows "name = "
    times: int = 1

    @property
    def result_type(self) -> str:
        return self.text.split(f" {self.opcode}(", 1)[0]

    @property
    def operands(self) -> list[str]:
        arguments = self.text.split(f" {self.opcode}(", 1)[-1].split("), ", 1)[0]
        return re.findall(r"%([\w.\-]+)", arguments)

    @property
    def cycles(self) -> int | None:
        found = re.search(r'"estimated_cycles":"(-?\d+)"', self.text)
        return int(found[1]) if found else None

    def called(self, role: str) -> list[str]:
        """The computations it names for a role."""
        return re.findall(rf"\b{role}=%?([\w.\-]+)", self.text)


def estimate(executable: Any, topology: Topology) -> Estimate:
    """Reads an executable.

    Args:
      executable: from `tpu_compiler.compile_hlo`.
      topology: for which it was compiled.
    """
    chip = topology.chip
    program = _Program(executable.hlo_modules()[0].to_string())
    memory = executable.get_compiled_memory_stats()
    costs = executable.cost_analysis()
    costs = costs[0] if isinstance(costs, list) else costs
    raw, adjusted = 0.0, 0.0
    unestimated: collections.Counter[str] = collections.Counter()
    kinds: list[tuple[float, str, str]] = []
    for each in program.schedule():
        estimated = None if each.cycles is None else each.cycles / chip.clock
        moved = program.moved_bytes(each) / (_USABLE_BANDWIDTH * chip.bandwidth)
        if estimated is not None:
            raw += each.times * estimated
            kind = (re.findall(r"kind=k(\w+)", each.text) or [each.opcode])[0]
            origin = (re.findall(r'op_name="([^"]*)"', each.text) or [each.name])[0]
            kinds.append((each.times * estimated, kind, origin))
        elif not each.opcode.endswith(("-start", "-done")):
            reason = program.reason(each)
            if reason in _SLOW or program.moved_bytes(each) > _SMALL:
                unestimated[reason] += each.times
        if each.opcode.endswith(("-start", "-done")):
            continue  # asynchronous: behind something else
        if estimated is None:
            adjusted += each.times * moved
        elif re.search(r"kind=k(Output|Custom)", each.text):
            adjusted += each.times * estimated
        else:
            adjusted += each.times * min(estimated, max(moved, _LEAST_SECONDS))
    flop = costs.get("flops", 0.0)
    hbm = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return Estimate(
        flop=flop,
        hbm=hbm,
        raw=raw,
        adjusted=adjusted,
        roofline=flop / chip.mxu / chip.clock,
        unestimated=dict(unestimated.most_common()),
        largest=sorted(kinds, reverse=True)[:20],
    )


class _Program:
    """An optimised HLO module, from its text."""

    def __init__(self, text: str) -> None:
        self._computations: dict[str, list[_Instruction]] = {}
        self._entry = ""
        current: list[_Instruction] | None = None
        for line in text.splitlines():
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
            if head and "=" not in line.split("(", 1)[0]:
                current = self._computations.setdefault(head[2], [])
                self._entry = head[2] if head[1] else self._entry
            elif line.startswith("}"):
                current = None
            elif current is not None:
                found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line)
                if found:
                    current.append(_Instruction(found[1], _opcode(found[2]), found[2]))
        self._instructions = {
            each.name: each for instructions in self._computations.values() for each in instructions
        }

    def schedule(self) -> Iterator[_Instruction]:
        """Every instruction that takes time, with how often it runs.

        Of the branches of a conditional, the one that takes longest.
        """
        yield from self._walk(self._entry, 1)

    def _walk(self, computation: str, times: int) -> Iterator[_Instruction]:
        for each in self._computations.get(computation, []):
            if each.opcode in _FREE:
                continue
            if each.opcode == "while":
                trips = self._trips(each)
                yield from self._walk(each.called("body")[0], times * (trips or 1))
                if trips is None:
                    yield _Instruction(each.name, "while of unknown length", "", times)
            elif each.opcode == "conditional":
                listed = re.findall(r"branch_computations=\{([^}]*)\}", each.text)
                names = [n.strip().lstrip("%") for part in listed for n in part.split(",")]
                names += each.called("true_computation") + each.called("false_computation")
                branches = [list(self._walk(name, times)) for name in names]
                yield from max(branches, key=_total_cycles, default=[])
            elif each.opcode == "call":
                yield from self._walk(each.called("to_apply")[0], times)
            else:
                yield _Instruction(each.name, each.opcode, each.text, times)

    def _trips(self, loop: _Instruction) -> int | None:
        """The number of iterations of a loop, if it is a constant."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
        if known:
            return int(known[1])
        # Most loops aren't annotated: they count in steps of one, up to what their condition says.
        condition = self._computations.get(loop.called("condition")[0], [])
        if not condition or "direction=LT" not in condition[-1].text:
            return None
        counter, bound = condition[-1].operands
        place = re.search(r"\bindex=(\d+)", self._instructions[counter].text)
        given = self._instructions.get(loop.operands[0])
        if place is None or given is None or given.opcode != "tuple":
            return None
        start, end = self._constant(given.operands[int(place[1])]), self._constant(bound)
        return None if start is None or end is None else max(end - start, 0)

    def _constant(self, name: str) -> int | None:
        """The value of an integer that is known."""
        each = self._instructions.get(name)
        while each is not None and each.opcode == "copy":
            each = self._instructions.get(each.operands[0])
        found = re.search(r" constant\((\d+)\)", each.text) if each else None
        return int(found[1]) if found else None

    def _type(self, name: str) -> str:
        each = self._instructions.get(name)
        return each.result_type if each else ""

    def moved_bytes(self, each: _Instruction) -> int:
        """Bytes it reads from and writes to the HBM."""
        result = _hbm_bytes(each.result_type)
        given = [_hbm_bytes(self._type(name)) for name in set(each.operands)]
        reason = self.reason(each)
        if reason == "gather":
            return result + sum(given) - max(given, default=0) + self._looked_up_bytes(each)
        if reason in ("scatter", "dynamic-update-slice") and result in given:
            return 2 * (sum(given) - result)  # in place: it reads and writes what is new
        return result + sum(given)

    def _looked_up_bytes(self, each: _Instruction) -> int:
        """Bytes that a gather reads of its table: for each look-up all tiles it touches.

        The code that the compiler makes copies whole tiles from the HBM, 4 KiB for one number.
        """
        inside = [i for name in each.called("calls") for i in self._computations.get(name, [])]
        gather = next((i for i in [each, *inside] if i.opcode == "gather"), each)
        sizes = re.search(r"slice_sizes=\{([\d,]+)\}", gather.text)
        table = _TYPE.match(self._type(gather.operands[0]))
        result = _TYPE.match(gather.result_type)
        if not sizes or not table or not result:
            return 0
        kind, _, layout, rest = table.groups()
        slice_type = f"{kind}[{sizes[1]}]{{{layout}{re.sub(r'S[(][0-9]+[)]', '', rest or '')}}}"
        numbers = [
            math.prod(int(n) for n in text.split(",") if n) for text in (result[2], sizes[1])
        ]
        return numbers[0] // numbers[1] * _hbm_bytes(slice_type)

    def reason(self, each: _Instruction) -> str:
        """The kind of an instruction without an estimate: of a fusion, the op that explains it."""
        inside = {
            i.opcode for name in each.called("calls") for i in self._computations.get(name, [])
        }
        return next((opcode for opcode in _SLOW if opcode in inside), each.opcode)


def _opcode(text: str) -> str:
    head = re.sub(r"\{[^{}]*\}", "", text.split(", metadata=")[0])
    found = re.search(r"(?:\)|\]|\}|^\S+)\s+([a-z][a-z0-9\-]*)\(", head)
    return found[1] if found else "?"


def _total_cycles(instructions: list[_Instruction]) -> int:
    return sum((each.cycles or 0) * each.times for each in instructions)


_TYPE = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\](?:\{([\d,]*)((?::|\()?[^{}]*)\})?")


def _hbm_bytes(types: str) -> int:
    """Bytes of all arrays in a text of types that live in the HBM, padding to tiles included."""
    total = 0
    for kind, dimensions, layout, rest in _TYPE.findall(types):
        if re.search(r"S\([1-9]\)", rest):
            continue  # on the chip
        sizes = [int(size) for size in dimensions.split(",") if size]
        order = [int(axis) for axis in layout.split(",") if axis] or list(range(len(sizes)))[::-1]
        tile = re.search(r"T\(([\d,]+)\)", rest)
        if tile and len(order) == len(sizes):
            for axis, side in zip(order, reversed(tile[1].split(",")), strict=False):
                sizes[axis] = -(-sizes[axis] // int(side)) * int(side)
        count = 1
        for size in sizes:
            count *= size
        bits = re.search(r"\d+$", kind)
        total += count * max(int(bits[0]) // 8 if bits else 1, 1)
    return total
