"""What each instruction of the machine code does to the registers of many threads at once.

NVIDIA documents the names of these instructions (CUDA Binary Utilities, "Instruction Set Reference") but not their
operands. What is written here was read from the code that the compiler makes of known sources, and is tested by
results: a kernel that is executed by it must write the bits that the emulated source writes. An instruction that is
not here is an error, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from profiling.compiled_code import Instruction

U32, U64, I32, I64 = np.uint32, np.uint64, np.int32, np.int64
F32, F64 = np.float32, np.float64

#: Rows of the register file: the general ones, then the uniform ones of a warp, which every thread holds a copy of.
REGISTERS = 320
_ZERO, _UNIFORM, _UNIFORM_ZERO = 255, 256, 319
#: Rows of the predicates: P0 to P6 and PT, UP0 to UP6 and UPT.
PREDICATES = 16
_CONSTANT = r"c\[0x(\w+)\]\[(?:(U?R\w+)\+?)?(?:0x(\w+))?\]"

# ``threads`` has ``registers``, ``predicates`` and ``constants``; ``at`` chooses among its columns.
Action = Callable[[Any, Any], None]
Value = Callable[[Any, Any], Any]
Put = Callable[[Any, Any, Any], None]
Builder = Callable[[list[str], list[str]], Action]


class UnknownInstructionError(Exception):
    """An instruction, or a form of one, that is not described here."""


def register(text: str) -> int | None:
    """Row of ``R7`` or ``UR7``; None for anything else."""
    found = re.fullmatch(r"(U?)R(Z|\d+)", text)
    if found is None:
        return None
    if found[2] == "Z":
        return _UNIFORM_ZERO if found[1] else _ZERO
    return int(found[2]) + (_UNIFORM if found[1] else 0)


def predicate(text: str) -> tuple[int, bool] | None:
    """Row of ``P3``, and whether it is negated (``!P3``); None for anything else."""
    found = re.fullmatch(r"(!?)(U?)P(T|\d)", text)
    if found is None:
        return None
    return (7 if found[3] == "T" else int(found[3])) + (8 if found[2] else 0), bool(found[1])


def split(operands: str) -> list[str]:
    """The operands of an instruction, without hints to the hardware."""
    operands = re.sub(r"\(\*.*?\*\)", "", operands).replace(".reuse", "")
    return [part.strip() for part in operands.split(",") if part.strip()]


def _constant(text: str) -> Callable[..., Any] | None:
    """A word of a bank of constants, or one that lies ``more`` bytes after it; None for any other operand."""
    found = re.fullmatch(_CONSTANT, text)
    if found is None:
        return None
    bank, offset = int(found[1], 16), int(found[3] or "0", 16)
    index = register(found[2]) if found[2] else None

    def word(threads: Any, at: Any, more: int = 0) -> Any:
        words = threads.constants[bank]
        if index is None:
            return words[(offset + more) // 4]
        return words[(threads.registers[index, at] + U32(offset + more)) // 4]

    return word


def _bits(text: str, is_float: bool) -> Value:
    """The 32 bits of an operand, without its signs."""
    row = register(text)
    if row is not None:
        return lambda threads, at: threads.registers[row, at]
    word = _constant(text)
    if word is not None:
        return word
    number = U32(_number(text, is_float))
    return lambda threads, at: number


def _number(text: str, is_float: bool) -> int:
    if re.fullmatch(r"-?0x[0-9a-f]+", text):
        return int(text, 16) & 0xFFFFFFFF
    special = {"+INF": 0x7F800000, "-INF": 0xFF800000, "+QNAN": 0x7FC00000, "-QNAN": 0xFFC00000}
    if text in special:
        return special[text]
    try:
        return int(F32(float(text)).view(U32)) if is_float or not text.lstrip("-").isdigit() else int(text) & 0xFFFFFFFF
    except ValueError as error:
        raise UnknownInstructionError(f"operand {text}") from error


def integer(text: str) -> Value:
    """An operand as 32-bit integers: ``-x`` is its negative, ``~x`` its complement."""
    if text.startswith("-") and register(text[1:]) is not None:
        value = _bits(text[1:], False)
        return lambda threads, at: U32(0) - value(threads, at)
    if text.startswith("~"):
        value = _bits(text[1:], False)
        return lambda threads, at: ~value(threads, at)
    return _bits(text, False)


def _addend(text: str) -> Value:
    """An operand of an addition that carries: the negative of 0 is 2**32."""
    if text.startswith("-") and register(text[1:]) is not None:
        value = _bits(text[1:], False)
        return lambda threads, at: U64(2**32) - value(threads, at).astype(U64)
    value = integer(text)
    return lambda threads, at: value(threads, at).astype(U64)


def floating(text: str) -> Value:
    """An operand as float32, with its signs."""
    negative = text.startswith("-") and not re.fullmatch(r"-([\d.]+(e[+-]?\d+)?|INF|QNAN|0x.*)", text)
    text = text[1:] if negative else text
    absolute = text.startswith("|")
    return _with_signs(_bits(text.strip("|"), True), negative, absolute, U32(2**31), F32)


def _with_signs(value: Value, negative: bool, absolute: bool, sign: Any, kind: Any) -> Value:
    """The bits of a value as floats; ``sign`` is the bit of the sign."""

    def signed(threads: Any, at: Any) -> Any:
        bits = value(threads, at)
        if absolute:
            bits = bits & ~sign
        if negative:
            bits = bits ^ sign
        return bits.view(kind)

    return signed


def wide(text: str) -> Value:
    """An operand as the 64 bits of two registers."""
    row = register(text)
    if row is not None:
        if row in (_ZERO, _UNIFORM_ZERO):
            return lambda threads, at: U64(0)
        return lambda threads, at: (
            threads.registers[row, at].astype(U64) | threads.registers[row + 1, at].astype(U64) << U64(32)
        )
    word = _constant(text)
    if word is not None:

        def constant(threads: Any, at: Any) -> Any:
            low, high = (np.asarray(word(threads, at, more)) for more in (0, 4))
            return low.astype(U64) | high.astype(U64) << U64(32)

        return constant
    number = U64(int(text, 16) & 0xFFFFFFFFFFFFFFFF)
    return lambda threads, at: number


def double(text: str) -> Value:
    """An operand as float64, with its signs."""
    special = {"+INF": np.inf, "-INF": -np.inf, "+QNAN": np.nan, "-QNAN": np.nan}
    if text in special or re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", text):
        number = F64(special[text] if text in special else float(text))
        return lambda threads, at: number
    negative, absolute = text.startswith("-"), "|" in text
    return _with_signs(wide(text.strip("-|")), negative, absolute, U64(2**63), F64)


def truth(text: str) -> Value:
    """A predicate operand."""
    found = predicate(text)
    if found is None:
        raise UnknownInstructionError(f"predicate {text}")
    row, negated = found
    if negated:
        return lambda threads, at: ~threads.predicates[row, at]
    return lambda threads, at: threads.predicates[row, at]


def _dropped(threads: Any, at: Any, bits: Any) -> None:
    """What is written to a register that is always 0, or to a predicate that is always true."""


def _put(text: str, modifiers: Sequence[str] = ()) -> Put:
    row = register(text)
    if row is None:
        raise UnknownInstructionError(f"result {text}")

    def put(threads: Any, at: Any, bits: Any) -> None:
        threads.registers[row, at] = bits

    return _dropped if row in (_ZERO, _UNIFORM_ZERO) else put


def _put_wide(text: str, modifiers: Sequence[str] = ()) -> Put:
    row = register(text)
    assert row is not None

    def put(threads: Any, at: Any, bits: Any) -> None:
        threads.registers[row, at] = bits & U64(0xFFFFFFFF)
        threads.registers[row + 1, at] = bits >> U64(32)

    return _dropped if row in (_ZERO, _UNIFORM_ZERO) else put


def _put_truth(text: str, modifiers: Sequence[str] = ()) -> Put:
    found = predicate(text)
    if found is None:
        raise UnknownInstructionError(f"predicate {text}")
    row = found[0]

    def put(threads: Any, at: Any, bits: Any) -> None:
        threads.predicates[row, at] = bits

    return _dropped if row in (7, 15) else put


def _put_float(text: str, modifiers: Sequence[str]) -> Put:
    put, saturate = _put(text), "SAT" in modifiers

    def put_float(threads: Any, at: Any, value: Any) -> None:
        if saturate:
            value = np.where(np.isnan(value), F32(0), np.clip(value, F32(0), F32(1)))
        bits = np.where(np.isnan(value), U32(0x7FFFFFFF), np.asarray(value, F32).view(U32))
        put(threads, at, bits)

    return put_float


def _put_double(text: str, modifiers: Sequence[str]) -> Put:
    put = _put_wide(text)
    return lambda threads, at, value: put(threads, at, np.asarray(value, F64).view(U64))


def _pointwise(
    function: Callable[..., Any], put: Callable[[str, list[str]], Put], *reads: Callable[[str], Value]
) -> Builder:
    """An instruction with one result, which is a function of its operands."""

    def build(modifiers: list[str], operands: list[str]) -> Action:
        result, values = put(operands[0], modifiers), [read(operands[1 + i]) for i, read in enumerate(reads)]
        return lambda threads, at: result(threads, at, function(*(value(threads, at) for value in values)))

    return build


def _signed(bits: Any) -> Any:
    return bits.view(I32)


def _leading(operands: Sequence[str], after: int = 1) -> tuple[list[str], list[str]]:
    """The predicates that follow the result, which are results too, and the rest."""
    count = after
    while count < len(operands) and predicate(operands[count]) is not None:
        count += 1
    return list(operands[after:count]), list(operands[count:])


def _pack(low: Any, high: Any) -> Any:
    return low.astype(U32) | (high.astype(U32) << U32(16))


# Sums and products of integers


def _iadd3(modifiers: list[str], operands: list[str]) -> Action:
    carries, rest = _leading(operands)
    extended = "X" in modifiers
    terms = [(lambda v: lambda t, at: v(t, at).astype(U64))(integer(o)) if extended else _addend(o) for o in rest[:3]]
    ins = [truth(o) for o in rest[3:]]
    put, outs = _put(operands[0]), [_put_truth(o) for o in carries]

    def act(threads: Any, at: Any) -> None:
        total = terms[0](threads, at) + terms[1](threads, at) + terms[2](threads, at)
        for carry in ins:
            total = total + carry(threads, at)
        put(threads, at, total & U64(0xFFFFFFFF))
        for least, out in enumerate(outs, 1):
            out(threads, at, (total >> U64(32)) >= least)

    return act


def _imad(modifiers: list[str], operands: list[str]) -> Action:
    carries, rest = _leading(operands)
    unsigned = "U32" in modifiers
    a, b = integer(rest[0]), integer(rest[1])
    ins = [truth(o) for o in rest[3:]]
    outs = [_put_truth(o) for o in carries]
    if "WIDE" in modifiers or "HI" in modifiers:
        high = "HI" in modifiers
        c, put_wide, put = wide(rest[2]), _put_wide(operands[0]), _put(operands[0])

        def act(threads: Any, at: Any) -> None:
            x, y = a(threads, at), b(threads, at)
            if unsigned:
                product = x.astype(U64) * y.astype(U64)
            else:
                product = (_signed(x).astype(I64) * _signed(y).astype(I64)).view(U64)
            total = product + c(threads, at)
            carry = total < product
            for more in ins:
                plus = more(threads, at).astype(U64)
                carry = carry | ((total + plus) < total)
                total = total + plus
            if high:
                put(threads, at, total >> U64(32))
            else:
                put_wide(threads, at, total)
            for out in outs:
                out(threads, at, carry)

        return act
    c32, put = integer(rest[2]), _put(operands[0])

    def short(threads: Any, at: Any) -> None:
        total = a(threads, at) * b(threads, at) + c32(threads, at)
        for more in ins:
            total = total + more(threads, at).astype(U32)
        put(threads, at, total)

    if not outs:
        return short

    def carrying(threads: Any, at: Any) -> None:
        total = (a(threads, at) * b(threads, at)).astype(U64) + c32(threads, at).astype(U64)
        for more in ins:
            total = total + more(threads, at).astype(U64)
        put(threads, at, total & U64(0xFFFFFFFF))
        outs[0](threads, at, total >= U64(2**32))

    return carrying


def _lea(modifiers: list[str], operands: list[str]) -> Action:
    carries, rest = _leading(operands)
    put, outs = _put(operands[0]), [_put_truth(o) for o in carries]
    ins: list[Value] = []
    if predicate(rest[-1]) is not None:
        ins = [truth(rest.pop())]
    shift = int(rest[-1], 16)
    a, b = integer(rest[0]), _addend(rest[1])
    high, sign = "HI" in modifiers, "SX32" in modifiers
    above = integer(rest[2]) if high and not sign else None

    def act(threads: Any, at: Any) -> None:
        x = a(threads, at)
        if not high:
            term = x << U32(shift)
        elif sign:
            term = (_signed(x).astype(I64) >> I64(32 - shift)).astype(U64).astype(U32)
        else:
            assert above is not None
            term = (((above(threads, at).astype(U64) << U64(32)) | x.astype(U64)) >> U64(32 - shift)).astype(U32)
        total = term.astype(U64) + b(threads, at)
        for carry in ins:
            total = total + carry(threads, at)
        put(threads, at, total & U64(0xFFFFFFFF))
        for out in outs:
            out(threads, at, total >= U64(2**32))

    return act


# Bits


def _table(table: int, a: Any, b: Any, c: Any) -> Any:
    """A function of three bits, by its table: the row of a = b = c = 1 is its highest bit."""
    known = {0xC0: lambda: a & b, 0xFC: lambda: a | b, 0x3C: lambda: a ^ b, 0x96: lambda: a ^ b ^ c}
    known |= {0xF8: lambda: a | (b & c), 0xEA: lambda: (a & b) | c, 0xFE: lambda: a | b | c, 0x80: lambda: a & b & c}
    if table in known:
        return known[table]()
    result: Any = a & ~a
    for row in range(8):
        if table >> row & 1:
            result = result | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
    return result


def _lop3(modifiers: list[str], operands: list[str]) -> Action:
    outs: list[Callable] = []
    if predicate(operands[0]) is not None:
        outs = [_put_truth(operands[0])]
        operands = operands[1:]
    put, (a, b, c), table = _put(operands[0]), map(integer, operands[1:4]), int(operands[4], 16)

    def act(threads: Any, at: Any) -> None:
        bits = _table(table, a(threads, at), b(threads, at), c(threads, at))
        put(threads, at, bits)
        for out in outs:
            out(threads, at, bits != 0)

    return act


def _plop3(modifiers: list[str], operands: list[str]) -> Action:
    outs, (a, b, c) = [_put_truth(o) for o in operands[:2]], map(truth, operands[2:5])
    tables = [int(o, 16) for o in operands[5:7]]

    def act(threads: Any, at: Any) -> None:
        values = [v(threads, at) for v in (a, b, c)]
        for result, out in [(_table(table, *values), out) for table, out in zip(tables, outs, strict=True)]:
            out(threads, at, result)

    return act


def _shf(modifiers: list[str], operands: list[str]) -> Action:
    put, a, by, c = _put(operands[0]), *map(integer, operands[1:4])
    left, is_high = modifiers[0] == "L", "HI" in modifiers
    kind = modifiers[1]
    wraps = kind == "W"
    if wraps:
        kind = modifiers[2]
    if modifiers[0] not in ("L", "R") or kind not in ("U32", "S32", "U64", "S64") or (wraps and "64" in kind):
        raise UnknownInstructionError("SHF")

    def act(threads: Any, at: Any) -> None:
        low, high, places = a(threads, at), c(threads, at), by(threads, at)
        most = 31 if wraps else 32 if kind in ("U32", "S32") else 63
        few = (places & U32(31) if wraps else np.minimum(places, U32(most))).astype(U64)
        both = high.astype(U64) << U64(32) | low.astype(U64)
        if kind[0] == "S" and not left:
            shifted = (np.asarray(both).view(I64) >> few.astype(I64)).view(U64)
        else:
            shifted = both << few if left else both >> few
            if most == 63:
                shifted = np.where(places < 64, shifted, U64(0))
        put(threads, at, (shifted >> U64(32) if is_high else shifted) & U64(0xFFFFFFFF))

    return act


def _permuted(a: Any, choice: Any, c: Any) -> Any:
    """Four bytes of eight, each of them chosen by four bits; the highest asks for its sign alone."""
    both, result = c.astype(U64) << U64(32) | a.astype(U64), U64(0)
    for place in range(4):
        nibble = (choice >> U32(4 * place)) & U32(15)
        byte = both >> ((nibble & U32(7)).astype(U64) * U64(8)) & U64(255)
        byte = np.where(nibble & U32(8), np.where(byte & U64(128), U64(255), U64(0)), byte)
        result = result | byte << U64(8 * place)
    return result


def _highest_bit(modifiers: list[str], operands: list[str]) -> Action:
    if "U32" not in modifiers:
        raise UnknownInstructionError("FLO of signed integers")

    def place_of(bits: Any) -> Any:
        place = np.frexp(np.asarray(bits).astype(F64))[1] - 1
        found = (31 - place if "SH" in modifiers else place).astype(U32)
        return np.where(bits == 0, U32(0xFFFFFFFF), found)

    return _pointwise(place_of, _put, integer)(modifiers, operands)


def _reversed_bits(bits: Any) -> Any:
    for step, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        bits = (bits >> U32(step)) & U32(mask) | (bits & U32(mask)) << U32(step)
    return bits


# Moves and choices


_mov = _pointwise(lambda value: value, _put, integer)


def _ldc(modifiers: list[str], operands: list[str]) -> Action:
    if "64" in modifiers:
        return _pointwise(lambda value: value, _put_wide, wide)(modifiers, operands)
    if modifiers:
        raise UnknownInstructionError("LDC of a part")
    return _mov(modifiers, operands)


def _cs2r(modifiers: list[str], operands: list[str]) -> Action:
    if operands[1] != "SRZ":
        raise UnknownInstructionError(f"CS2R of {operands[1]}")
    return _pointwise(lambda: U64(0), _put if "32" in modifiers else _put_wide)(modifiers, operands)


def _extreme(modifiers: list[str], operands: list[str], plus: bool = False) -> Action:
    put, *values = _put(operands[0]), *map(integer, operands[1:-1])
    smallest, unsigned = truth(operands[-1]), "U32" in modifiers

    def act(threads: Any, at: Any) -> None:
        best, *others = [v(threads, at) for v in values]
        if plus:
            best = best + others.pop(0)
        for other in others:
            less = (best < other) if unsigned else (_signed(best) < _signed(other))
            best = np.where(less == smallest(threads, at), best, other)
        put(threads, at, best)

    return act


def _p2r(modifiers: list[str], operands: list[str]) -> Action:
    if operands[1] != "PR" or modifiers:
        raise UnknownInstructionError("P2R")
    put, other, mask = _put(operands[0]), integer(operands[2]), int(operands[3], 16)

    def act(threads: Any, at: Any) -> None:
        bits = other(threads, at) & U32(0xFFFFFFFF ^ mask)
        for row in range(7):
            if mask >> row & 1:
                bits = bits | threads.predicates[row, at].astype(U32) << U32(row)
        put(threads, at, bits)

    return act


def _r2p(modifiers: list[str], operands: list[str]) -> Action:
    if operands[0] != "PR" or modifiers:
        raise UnknownInstructionError("R2P")
    register, _, byte = operands[1].partition(".B")
    value, mask = integer(register), int(operands[2], 16)

    def act(threads: Any, at: Any) -> None:
        bits = value(threads, at) >> U32(8 * int(byte or 0))
        for row in range(7):
            if mask >> row & 1:
                threads.predicates[row, at] = (bits >> U32(row)) & U32(1)

    return act


# Comparisons

_ORDERS: dict[str, Callable[[Any, Any], Any]] = {
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
}


def _float_order(name: str, a: Any, b: Any) -> Any:
    unordered = np.isnan(a) | np.isnan(b)
    if name == "NAN":
        return unordered
    if name == "NUM":
        return ~unordered
    if name in _ORDERS:
        return _ORDERS[name](a, b) & ~unordered
    return _ORDERS[name[:-1]](a, b) | unordered  # GTU: greater or unordered


def _combined(modifiers: list[str], result: Any, other: Any) -> Any:
    if "AND" in modifiers:
        return result & other
    if "OR" in modifiers:
        return result | other
    return result ^ other


def _setp(modifiers: list[str], operands: list[str], read: Callable[[str], Value], order: Callable[..., Any]) -> Action:
    """Whether two operands are in an order, combined with a predicate; and whether they are not, likewise."""
    outs, (a, b), other = [_put_truth(o) for o in operands[:2]], map(read, operands[2:4]), truth(operands[4])
    more = [truth(operands[5])] if "EX" in modifiers else []

    def act(threads: Any, at: Any) -> None:
        result = order(*(v(threads, at) for v in (a, b, *more)))
        also = other(threads, at)
        first, second = _combined(modifiers, result, also), _combined(modifiers, ~np.asarray(result), also)
        outs[0](threads, at, first)
        outs[1](threads, at, second)

    return act


def _isetp(modifiers: list[str], operands: list[str]) -> Action:
    name = modifiers[0]

    def order(x: Any, y: Any, below: Any = None) -> Any:
        """``below`` is the order of the lower halves, of numbers of 64 bits."""
        if "U32" not in modifiers:
            x, y = _signed(x), _signed(y)
        if below is None:
            return _ORDERS[name](x, y)
        if name == "NE":
            return (x != y) | below
        strict = False if name == "EQ" else _ORDERS[name[0] + "T"](x, y)
        return strict | ((x == y) & below)

    return _setp(modifiers, operands, integer, order)


def _float_setp(read: Callable[[str], Value]) -> Builder:
    def build(modifiers: list[str], operands: list[str]) -> Action:
        if modifiers == ["MAX", "AND"] and operands[4] == "PT":
            return _maximum_setp(operands, read)
        return _setp(modifiers, operands, read, partial(_float_order, modifiers[0]))

    return build


def _maximum_setp(operands: list[str], read: Callable[[str], Value]) -> Action:
    """Whether the first operand is the larger one, or the only number; and whether neither is a number."""
    outs, (a, b) = [_put_truth(o) for o in operands[:2]], map(read, operands[2:4])

    def act(threads: Any, at: Any) -> None:
        first, second = a(threads, at), b(threads, at)
        outs[0](threads, at, (first > second) | np.isnan(second))
        outs[1](threads, at, np.isnan(first) & np.isnan(second))

    return act


def _needs_slow_division(a: Any, b: Any) -> Any:
    """Whether a division of float32 needs the slow way: what is near the ends of the exponents' range."""
    above, below = (np.asarray(v.view(U32) >> U32(23) & U32(255)).astype(I32) for v in (a, b))
    beyond = (below < 2) | (below > 252) | (above == 255) | (above < 25)
    return beyond | (above - below > 125) | (above - below < -124)


# Floats


def _rounded(value: Any, modifiers: list[str]) -> Any:
    """float64 to float32, in the direction that the instruction names."""
    near = value.astype(F32)
    back = near.astype(F64)
    infinity = F32(np.inf)
    if "RM" in modifiers:
        return np.where(back > value, np.nextafter(near, -infinity), near)
    if "RP" in modifiers:
        return np.where(back < value, np.nextafter(near, infinity), near)
    if "RZ" in modifiers:
        return np.where(np.abs(back) > np.abs(value), np.nextafter(near, F32(0)), near)
    return near


def _ffma(modifiers: list[str], operands: list[str]) -> Action:
    def fused(a: Any, b: Any, c: Any) -> Any:
        exact = a.astype(F64) * b.astype(F64)
        addend = np.asarray(c).astype(F64)
        total = np.asarray(exact + addend)
        # The sum was rounded to 53 bits. An odd last bit where it was not exact makes the second rounding right.
        error = (exact - (total - (total - exact))) + (addend - (total - exact))
        bits = total.view(I64)
        towards = np.where((error > 0) == (total > 0), 0, -1)
        odd = np.where((error != 0) & (bits & 1 == 0) & np.isfinite(total), bits + towards | 1, bits)
        return _rounded(odd.view(F64), modifiers)

    return _pointwise(fused, _put_float, floating, floating, floating)(modifiers, operands)


def _fmnmx(modifiers: list[str], operands: list[str]) -> Action:
    least, most = (np.minimum, np.maximum) if "NAN" in modifiers else (np.fmin, np.fmax)

    def extreme(x: Any, y: Any, smallest: Any) -> Any:
        return np.where(smallest, least(x, y), most(x, y))

    return _pointwise(extreme, _put_float, floating, floating, truth)(modifiers, operands)


def _mufu(modifiers: list[str], operands: list[str]) -> Action:
    """Approximations of the hardware's; here the value itself, rounded once."""
    kind = modifiers[0]
    if kind in ("RCP64H", "RSQ64H"):

        def of_high_half(high: Any) -> Any:
            value = (high.astype(U64) << U64(32)).view(F64)
            result = 1.0 / (value if kind == "RCP64H" else np.sqrt(value))
            return np.asarray(result).view(U64) >> U64(32)

        return _pointwise(of_high_half, _put, integer)(modifiers, operands)
    functions: dict[str, Callable[[Any], Any]] = {
        "RCP": lambda x: 1 / x,
        "RSQ": lambda x: 1 / np.sqrt(x),
        "SQRT": np.sqrt,
        "EX2": np.exp2,
        "LG2": np.log2,
        "TANH": np.tanh,
    }
    if kind not in functions:
        raise UnknownInstructionError(f"MUFU.{kind}")
    function = functions[kind]
    return _pointwise(lambda x: function(np.asarray(x, F64)).astype(F32), _put_float, floating)(modifiers, operands)


def _fma64(a: Any, b: Any, c: Any) -> Any:
    # Of 64 bits of mantissa, not 106: a last bit may differ.
    return np.asarray(np.longdouble(a) * np.longdouble(b) + np.longdouble(c), F64)


# Conversions


def _half_bits(value: Any, kind: str) -> Any:
    """float32 to the bits of float16 or bfloat16, to nearest, even at ties."""
    if kind == "F16":
        return np.where(np.isnan(value), U32(0x7FFF), np.asarray(value, F32).astype(np.float16).view(np.uint16))
    bits = np.asarray(value, F32).view(U32)
    rounded = (bits + U32(0x7FFF) + (bits >> U32(16) & U32(1))) >> U32(16)
    return np.where(np.isnan(value), U32(0x7FFF), rounded)


def _f2fp(modifiers: list[str], operands: list[str]) -> Action:
    kind = "BF16" if "BF16" in modifiers else "F16"
    if "PACK_AB" not in modifiers or "F32" not in modifiers:
        raise UnknownInstructionError("F2FP")
    positive = "RELU" in modifiers

    def half(value: Any) -> Any:
        return _half_bits(np.where(value < 0, F32(0), value) if positive else value, kind)

    return _pointwise(lambda high, low: _pack(half(low), half(high)), _put, floating, floating)(modifiers, operands)


def _f2f(modifiers: list[str], operands: list[str]) -> Action:
    to, source = [*modifiers, "F32"][:2]
    if source == "F64":
        build = _pointwise(lambda value: value.astype(F32), _put_float, double)
    elif to == "F64":
        build = _pointwise(lambda value: value.astype(F64), _put_double, floating)
    elif to in ("F16", "BF16") and source == "F32":
        build = _pointwise(lambda value: _half_bits(value, to), _put, floating)
    else:
        raise UnknownInstructionError("F2F")
    return build(modifiers, operands)


def _halves(text: str, is_bfloat: bool) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Low and high half of an operand as float32."""
    negative, text = text.startswith("-"), text.lstrip("-")
    absolute, text = "|" in text, text.replace("|", "")
    name, _, which = text.partition(".")
    value = _bits(name, False)

    def convert(bits: Any) -> Any:
        wide_bits = np.asarray(bits & U32(0xFFFF))
        single = (wide_bits << U32(16)).view(F32) if is_bfloat else wide_bits.astype(np.uint16).view(np.float16)
        single = np.asarray(single, F32)
        single = np.abs(single) if absolute else single
        return -single if negative else single

    def read(threads: Any, at: Any) -> tuple[Any, Any]:
        bits = value(threads, at)
        low, high = convert(bits), convert(bits >> U32(16))
        return {"H0_H0": (low, low), "H1_H1": (high, high)}.get(which, (low, high))

    return read


def _sums_of_pairs(modifiers: list[str], to: str, first: str, second: str) -> Action:
    """Two half values and two others; float32 has more than twice their bits, so that it rounds as they do."""
    if set(modifiers) - {"MMA", "BF16_V2"}:
        raise UnknownInstructionError(f"sums of pairs by {'.'.join(modifiers)}")
    is_bfloat = "BF16_V2" in modifiers
    put, a, b = _put(to), _halves(first, is_bfloat), _halves(second, is_bfloat)

    def act(threads: Any, at: Any) -> None:
        parts = zip(a(threads, at), b(threads, at), strict=True)
        put(threads, at, _pack(*(_half_bits(x + y, "BF16" if is_bfloat else "F16") for x, y in parts)))

    return act


def _hadd2(modifiers: list[str], operands: list[str]) -> Action:
    if modifiers != ["F32"]:
        return _sums_of_pairs(modifiers, *operands)
    if operands[1] != "-RZ":
        raise UnknownInstructionError("HADD2.F32 that is no conversion")
    put, value = _put(operands[0]), _halves(operands[2], False)
    return lambda threads, at: put(threads, at, value(threads, at)[0].view(U32))


def _hfma2(modifiers: list[str], operands: list[str]) -> Action:
    if operands[2:4] == ["1", "1"]:
        return _sums_of_pairs(modifiers, operands[0], operands[1], operands[4])
    if [o.lstrip("-") for o in operands[1:3]] != ["RZ", "RZ"]:
        raise UnknownInstructionError("HFMA2 that is no move and no sum")
    put, (high, low) = _put(operands[0]), (np.float16(float(o)).view(np.uint16) for o in operands[3:5])
    bits = U32(int(high) << 16 | int(low))
    return lambda threads, at: put(threads, at, bits)


def _hset2(modifiers: list[str], operands: list[str]) -> Action:
    put, is_bfloat = _put(operands[0]), "BF16_V2" in modifiers
    if "BF" in modifiers:
        raise UnknownInstructionError("HSET2.BF")
    name = next(m for m in modifiers if m in (*_ORDERS, "NAN", "NUM") or m[:-1] in _ORDERS)
    a, b, other = _halves(operands[1], is_bfloat), _halves(operands[2], is_bfloat), truth(operands[3])

    def act(threads: Any, at: Any) -> None:
        also = other(threads, at)
        parts = zip(a(threads, at), b(threads, at), strict=True)
        low, high = (np.where(_combined(modifiers, _float_order(name, x, y), also), 0xFFFF, 0) for x, y in parts)
        put(threads, at, _pack(low, high))

    return act


def _hmnmx2(modifiers: list[str], operands: list[str]) -> Action:
    if "NAN" in modifiers or "XORSIGN" in modifiers or operands[2:4] != ["+INF", "+INF"] or operands[4] != "PT":
        raise UnknownInstructionError("HMNMX2 that is no smaller of a pair and infinity")
    put, is_bfloat = _put(operands[0]), "BF16_V2" in modifiers
    value, infinity = _halves(operands[1], is_bfloat), U32(0x7F80 if is_bfloat else 0x7C00)

    def act(threads: Any, at: Any) -> None:
        bits = _bits(operands[1], False)(threads, at)
        halves = zip(value(threads, at), (bits & U32(0xFFFF), bits >> U32(16)), strict=True)
        put(threads, at, _pack(*(np.where(np.isnan(single), infinity, half) for single, half in halves)))

    return act


def _from_integer(modifiers: list[str], operands: list[str]) -> Action:
    read, whole = integer, _signed
    if "U64" in modifiers:
        read, whole = wide, lambda bits: bits
    elif "U32" in modifiers:
        read, whole = integer, lambda bits: bits
    elif "S64" in modifiers:
        read, whole = wide, lambda bits: np.asarray(bits).astype(U64).view(I64)
    elif "U16" in modifiers:
        read, whole = integer, lambda bits: bits & 0xFFFF
    elif {"S16", "U8", "S8"} & set(modifiers):
        raise UnknownInstructionError(".".join(["I2F", *modifiers]))

    def rounded(bits: Any) -> Any:
        value = np.asarray(whole(bits))
        if "U64" not in modifiers:
            return _rounded(value.astype(F64), modifiers)
        # 64 bits hold more than a float64: towards 0 first, so that what was cut off still raises the result.
        near = value.astype(F32)
        short = near.astype(np.longdouble) < value.astype(np.longdouble)
        return np.where(short & ("RP" in modifiers), np.nextafter(near, F32(np.inf)), near)

    if "F64" in modifiers:
        return _pointwise(lambda bits: whole(bits).astype(F64), _put_double, read)(modifiers, operands)
    return _pointwise(rounded, _put_float, read)([], operands)


def _rounding(modifiers: list[str]) -> Callable[[Any], Any]:
    return np.trunc if "TRUNC" in modifiers else np.floor if "FLOOR" in modifiers else np.rint


def _to_integer(modifiers: list[str], operands: list[str]) -> Action:
    round_ = _rounding(modifiers)
    if {"S64", "F64", "U16", "S16", "U8", "S8"} & set(modifiers):
        raise UnknownInstructionError("F2I")
    low, high = (0, 2**32 - 1) if "U32" in modifiers else (-(2**31), 2**31 - 1)

    def wide_whole(value: Any) -> Any:
        return np.clip(np.nan_to_num(round_(value.astype(np.longdouble))), 0, 2**64 - 1).astype(U64)

    def whole(value: Any) -> Any:
        return np.clip(np.nan_to_num(round_(np.asarray(value, F64))), low, high).astype(I64) & 0xFFFFFFFF

    build = _pointwise(wide_whole, _put_wide, floating) if "U64" in modifiers else _pointwise(whole, _put, floating)
    return build(modifiers, operands)


def _frnd(modifiers: list[str], operands: list[str]) -> Action:
    put, read = (_put_double, double) if "F64" in modifiers else (_put_float, floating)
    return _pointwise(_rounding(modifiers), put, read)(modifiers, operands)


def _nothing(modifiers: list[str], operands: list[str]) -> Action:
    return lambda threads, at: None


_BUILDERS: dict[str, Builder] = {
    "IADD3": _iadd3,
    "VIADD": _pointwise(lambda a, b: a + b, _put, integer, integer),
    "IMAD": _imad,
    "LEA": _lea,
    "LOP3": _lop3,
    "PLOP3": _plop3,
    "SHF": _shf,
    "PRMT": _pointwise(_permuted, _put, integer, integer, integer),
    "POPC": _pointwise(np.bitwise_count, _put, integer),
    "FLO": _highest_bit,
    "BREV": _pointwise(_reversed_bits, _put, integer),
    "MOV": _mov,
    "R2UR": _mov,
    "LDC": _ldc,
    "CS2R": _cs2r,
    "SEL": _pointwise(lambda a, b, choice: np.where(choice, a, b), _put, integer, integer, truth),
    "FSEL": _pointwise(
        lambda a, b, choice: np.where(choice, a.view(U32), b.view(U32)), _put, floating, floating, truth
    ),
    **dict.fromkeys(("VIMNMX", "VIMNMX3"), _extreme),
    "VIADDMNMX": lambda modifiers, operands: _extreme(modifiers, operands, plus=True),
    "IABS": _pointwise(lambda value: np.abs(_signed(value)).astype(U32), _put, integer),
    "P2R": _p2r,
    "R2P": _r2p,
    "ISETP": _isetp,
    "FSETP": _float_setp(floating),
    "DSETP": _float_setp(double),
    "FCHK": _pointwise(_needs_slow_division, _put_truth, floating, floating),
    "FADD": _pointwise(lambda a, b: a + b, _put_float, floating, floating),
    "FMUL": _pointwise(lambda a, b: a * b, _put_float, floating, floating),
    "FFMA": _ffma,
    "FMNMX": _fmnmx,
    "MUFU": _mufu,
    "DADD": _pointwise(lambda a, b: a + b, _put_double, double, double),
    "DMUL": _pointwise(lambda a, b: a * b, _put_double, double, double),
    "DFMA": _pointwise(_fma64, _put_double, double, double, double),
    "F2FP": _f2fp,
    "F2F": _f2f,
    "HADD2": _hadd2,
    "HFMA2": _hfma2,
    "HSET2": _hset2,
    "HMNMX2": _hmnmx2,
    "I2F": _from_integer,
    "I2FP": _from_integer,
    "F2I": _to_integer,
    "FRND": _frnd,
    # Order and caches of memory, which here has neither.
    **dict.fromkeys(("NOP", "MEMBAR", "ERRBAR", "CGAERRBAR", "ENDCOLLECTIVE", "LDGDEPBAR"), _nothing),
}


def arithmetic(instruction: Instruction) -> Action | None:
    """What an instruction does to the registers of the threads it is given; None if it does more than that.

    Raises
    ------
    UnknownInstructionError
        For a form of it that is not described here.
    """
    mnemonic, *modifiers = instruction.opcode.split(".")
    builder = _BUILDERS.get(mnemonic)
    if builder is None and mnemonic.startswith("U"):  # of a whole warp, on registers of its own
        builder = _BUILDERS.get(mnemonic[1:])
    if builder is None:
        return None
    try:
        return builder(modifiers, split(instruction.operands))
    except (IndexError, ValueError, TypeError) as error:
        raise UnknownInstructionError(f"{instruction.opcode} {instruction.operands}: {error}") from error
