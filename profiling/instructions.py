"""What each instruction of the machine code does to the registers of many threads at once.

NVIDIA documents the names of these instructions (CUDA Binary Utilities, "Instruction Set Reference") but not their
operands. What is written here was read from the code that the compiler makes of known sources, and is tested by
results: a kernel that is executed by it must write the bits that the emulated source writes. An instruction that is
not here is an error, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
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


class UnknownInstructionError(Exception):
    """An instruction, or a form of one, that is not described here."""


def register(text: str) -> int | None:
    """Row of ``R7`` or ``UR7``; None for what is no register."""
    found = re.fullmatch(r"(U?)R(Z|\d+)", text)
    if found is None:
        return None
    if found[2] == "Z":
        return _UNIFORM_ZERO if found[1] else _ZERO
    return int(found[2]) + (_UNIFORM if found[1] else 0)


def predicate(text: str) -> tuple[int, bool] | None:
    """Row of ``P3``, and whether it is negated (``!P3``); None for what is no predicate."""
    found = re.fullmatch(r"(!?)(U?)P(T|\d)", text)
    if found is None:
        return None
    return (7 if found[3] == "T" else int(found[3])) + (8 if found[2] else 0), bool(found[1])


def split(operands: str) -> list[str]:
    """The operands of an instruction, without hints to the hardware."""
    operands = re.sub(r"\(\*.*?\*\)", "", operands).replace(".reuse", "")
    return [part.strip() for part in operands.split(",") if part.strip()]


def _constant(threads: Any, at: Any, bank: int, offset: int, index: int | None) -> Any:
    words = threads.constants[bank]
    if index is None:
        return words[offset // 4]
    return words[(threads.registers[index, at] + U32(offset)) // 4]


def _bits(text: str, is_float: bool) -> Value:
    """The 32 bits of an operand, without its signs."""
    row = register(text)
    if row is not None:
        return lambda threads, at: threads.registers[row, at]
    found = re.fullmatch(_CONSTANT, text)
    if found:
        bank, offset = int(found[1], 16), int(found[3] or "0", 16)
        index = register(found[2]) if found[2] else None
        return lambda threads, at: _constant(threads, at, bank, offset, index)
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
    value = _bits(text.strip("|"), True)

    def signed(threads: Any, at: Any) -> Any:
        bits = value(threads, at)
        if absolute:
            bits = bits & U32(0x7FFFFFFF)
        if negative:
            bits = bits ^ U32(0x80000000)
        return bits.view(F32)

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
    found = re.fullmatch(_CONSTANT, text)
    if found:
        bank, offset = int(found[1], 16), int(found[3] or "0", 16)
        index = register(found[2]) if found[2] else None

        def constant(threads: Any, at: Any) -> Any:
            low, high = (np.asarray(_constant(threads, at, bank, offset + more, index)) for more in (0, 4))
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
    value = wide(text.strip("-|"))

    def signed(threads: Any, at: Any) -> Any:
        bits = value(threads, at)
        if absolute:
            bits = bits & U64(2**63 - 1)
        if negative:
            bits = bits ^ U64(2**63)
        return bits.view(F64)

    return signed


def truth(text: str) -> Value:
    """A predicate operand."""
    found = predicate(text)
    if found is None:
        raise UnknownInstructionError(f"predicate {text}")
    row, negated = found
    if negated:
        return lambda threads, at: ~threads.predicates[row, at]
    return lambda threads, at: threads.predicates[row, at]


def _put(text: str) -> Callable[[Any, Any, Any], None]:
    row = register(text)
    if row is None:
        raise UnknownInstructionError(f"result {text}")
    if row in (_ZERO, _UNIFORM_ZERO):
        return lambda threads, at, bits: None

    def put(threads: Any, at: Any, bits: Any) -> None:
        threads.registers[row, at] = bits

    return put


def _put_wide(text: str) -> Callable[[Any, Any, Any], None]:
    row = register(text)
    assert row is not None
    if row in (_ZERO, _UNIFORM_ZERO):
        return lambda threads, at, bits: None

    def put(threads: Any, at: Any, bits: Any) -> None:
        threads.registers[row, at] = bits & U64(0xFFFFFFFF)
        threads.registers[row + 1, at] = bits >> U64(32)

    return put


def _put_truth(text: str) -> Callable[[Any, Any, Any], None]:
    found = predicate(text)
    if found is None:
        raise UnknownInstructionError(f"predicate {text}")
    row = found[0]
    if row in (7, 15):
        return lambda threads, at, bits: None

    def put(threads: Any, at: Any, bits: Any) -> None:
        threads.predicates[row, at] = bits

    return put


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


def _viadd(modifiers: list[str], operands: list[str]) -> Action:
    put, a, b = _put(operands[0]), integer(operands[1]), integer(operands[2])
    return lambda threads, at: put(threads, at, a(threads, at) + b(threads, at))


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
        x, y, places = a(threads, at), c(threads, at), by(threads, at)
        if wraps:
            places = places & U32(31)
        if kind in ("U32", "S32"):
            value, few = (x if left else y), np.minimum(places, U32(31))
            if kind == "S32":
                put(threads, at, _signed(np.asarray(value)) >> few.astype(I32))
                return
            shifted = value << few if left else value >> few
            put(threads, at, np.where(places < 32, shifted, U32(0)))
            return
        both, few64 = y.astype(U64) << U64(32) | x.astype(U64), np.minimum(places, U32(63)).astype(U64)
        if kind == "S64":
            shifted = (np.asarray(both).view(I64) >> few64.astype(I64)).view(U64)
        else:
            shifted = np.where(places < 64, both << few64 if left else both >> few64, U64(0))
        put(threads, at, (shifted >> U64(32) if is_high else shifted) & U64(0xFFFFFFFF))

    return act


def _prmt(modifiers: list[str], operands: list[str]) -> Action:
    put, a, chosen, c = _put(operands[0]), *map(integer, operands[1:4])

    def act(threads: Any, at: Any) -> None:
        both = c(threads, at).astype(U64) << U64(32) | a(threads, at).astype(U64)
        choice, result = chosen(threads, at), U64(0)
        for place in range(4):
            nibble = (choice >> U32(4 * place)) & U32(15)
            byte = both >> ((nibble & U32(7)).astype(U64) * U64(8)) & U64(255)
            byte = np.where(nibble & U32(8), np.where(byte & U64(128), U64(255), U64(0)), byte)
            result = result | byte << U64(8 * place)
        put(threads, at, result)

    return act


def _count_bits(modifiers: list[str], operands: list[str]) -> Action:
    put, value = _put(operands[0]), integer(operands[1])
    return lambda threads, at: put(threads, at, np.bitwise_count(value(threads, at)))


def _highest_bit(modifiers: list[str], operands: list[str]) -> Action:
    put, value, as_shift = _put(operands[0]), integer(operands[1]), "SH" in modifiers
    if "U32" not in modifiers:
        raise UnknownInstructionError("FLO of signed integers")

    def act(threads: Any, at: Any) -> None:
        bits = np.asarray(value(threads, at))
        place = np.frexp(bits.astype(F64))[1] - 1
        found = (31 - place if as_shift else place).astype(U32)
        put(threads, at, np.where(bits == 0, U32(0xFFFFFFFF), found))

    return act


def _reversed_bits(modifiers: list[str], operands: list[str]) -> Action:
    put, value = _put(operands[0]), integer(operands[-1])

    def act(threads: Any, at: Any) -> None:
        bits = value(threads, at)
        for step, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
            bits = (bits >> U32(step)) & U32(mask) | (bits & U32(mask)) << U32(step)
        put(threads, at, bits)

    return act


# Moves and choices


def _mov(modifiers: list[str], operands: list[str]) -> Action:
    put, value = _put(operands[0]), integer(operands[1])
    return lambda threads, at: put(threads, at, value(threads, at))


def _ldc(modifiers: list[str], operands: list[str]) -> Action:
    if "64" in modifiers:
        put_wide, both = _put_wide(operands[0]), wide(operands[1])
        return lambda threads, at: put_wide(threads, at, both(threads, at))
    if modifiers:
        raise UnknownInstructionError("LDC of a part")
    return _mov(modifiers, operands)


def _cs2r(modifiers: list[str], operands: list[str]) -> Action:
    if operands[1] != "SRZ":
        raise UnknownInstructionError(f"CS2R of {operands[1]}")
    if "32" in modifiers:
        put = _put(operands[0])
        return lambda threads, at: put(threads, at, U32(0))
    put_wide = _put_wide(operands[0])
    return lambda threads, at: put_wide(threads, at, U64(0))


def _sel(modifiers: list[str], operands: list[str]) -> Action:
    put, a, b, choice = _put(operands[0]), integer(operands[1]), integer(operands[2]), truth(operands[3])
    return lambda threads, at: put(threads, at, np.where(choice(threads, at), a(threads, at), b(threads, at)))


def _fsel(modifiers: list[str], operands: list[str]) -> Action:
    put, a, b, choice = _put(operands[0]), floating(operands[1]), floating(operands[2]), truth(operands[3])
    return lambda threads, at: put(
        threads, at, np.where(choice(threads, at), a(threads, at).view(U32), b(threads, at).view(U32))
    )


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


def _iabs(modifiers: list[str], operands: list[str]) -> Action:
    put, value = _put(operands[0]), integer(operands[1])
    return lambda threads, at: put(threads, at, np.abs(_signed(value(threads, at))).astype(U32))


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
    value, mask = integer(operands[1]), int(operands[2], 16)

    def act(threads: Any, at: Any) -> None:
        bits = value(threads, at)
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


def _isetp(modifiers: list[str], operands: list[str]) -> Action:
    name, unsigned = modifiers[0], "U32" in modifiers
    outs, (a, b) = [_put_truth(o) for o in operands[:2]], map(integer, operands[2:4])
    other, below = truth(operands[4]), (truth(operands[5]) if "EX" in modifiers else None)

    def act(threads: Any, at: Any) -> None:
        x, y = a(threads, at), b(threads, at)
        if not unsigned:
            x, y = _signed(x), _signed(y)
        if below is None:
            result = _ORDERS[name](x, y)
        elif name == "NE":
            result = (x != y) | below(threads, at)
        else:
            strict = False if name == "EQ" else _ORDERS[name[0] + "T"](x, y)
            result = strict | ((x == y) & below(threads, at))
        also = other(threads, at)
        first, second = _combined(modifiers, result, also), _combined(modifiers, ~np.asarray(result), also)
        outs[0](threads, at, first)
        outs[1](threads, at, second)

    return act


def _float_setp(modifiers: list[str], operands: list[str], read: Callable[[str], Value]) -> Action:
    outs, (a, b), other = [_put_truth(o) for o in operands[:2]], map(read, operands[2:4]), truth(operands[4])

    def act(threads: Any, at: Any) -> None:
        result = _float_order(modifiers[0], a(threads, at), b(threads, at))
        also = other(threads, at)
        first, second = _combined(modifiers, result, also), _combined(modifiers, ~np.asarray(result), also)
        outs[0](threads, at, first)
        outs[1](threads, at, second)

    return act


def _fchk(modifiers: list[str], operands: list[str]) -> Action:
    """Whether a division of float32 needs the slow way: what is near the ends of the exponents' range."""
    out, a, b = _put_truth(operands[0]), floating(operands[1]), floating(operands[2])

    def act(threads: Any, at: Any) -> None:
        above, below = (v(threads, at).view(U32) >> U32(23) & U32(255) for v in (a, b))
        above, below = np.asarray(above).astype(I32), np.asarray(below).astype(I32)
        out(
            threads,
            at,
            (below < 2)
            | (below > 252)
            | (above == 255)
            | (above < 25)
            | (above - below > 125)
            | (above - below < -124),
        )

    return act


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


def _put_float(text: str, modifiers: list[str]) -> Callable[[Any, Any, Any], None]:
    put, saturate = _put(text), "SAT" in modifiers

    def put_float(threads: Any, at: Any, value: Any) -> None:
        if saturate:
            value = np.where(np.isnan(value), F32(0), np.clip(value, F32(0), F32(1)))
        bits = np.where(np.isnan(value), U32(0x7FFFFFFF), np.asarray(value, F32).view(U32))
        put(threads, at, bits)

    return put_float


def _fadd(modifiers: list[str], operands: list[str]) -> Action:
    put, a, b = _put_float(operands[0], modifiers), floating(operands[1]), floating(operands[2])
    return lambda threads, at: put(threads, at, a(threads, at) + b(threads, at))


def _fmul(modifiers: list[str], operands: list[str]) -> Action:
    put, a, b = _put_float(operands[0], modifiers), floating(operands[1]), floating(operands[2])
    return lambda threads, at: put(threads, at, a(threads, at) * b(threads, at))


def _ffma(modifiers: list[str], operands: list[str]) -> Action:
    put, (a, b, c) = _put_float(operands[0], modifiers), map(floating, operands[1:4])

    def act(threads: Any, at: Any) -> None:
        exact = a(threads, at).astype(F64) * b(threads, at).astype(F64)
        addend = np.asarray(c(threads, at)).astype(F64)
        total = np.asarray(exact + addend)
        # The sum was rounded to 53 bits. An odd last bit where it was not exact makes the second rounding right.
        error = (exact - (total - (total - exact))) + (addend - (total - exact))
        bits = total.view(I64)
        towards = np.where((error > 0) == (total > 0), 0, -1)
        odd = np.where((error != 0) & (bits & 1 == 0) & np.isfinite(total), bits + towards | 1, bits)
        put(threads, at, _rounded(odd.view(F64), modifiers))

    return act


def _fmnmx(modifiers: list[str], operands: list[str]) -> Action:
    put, a, b = _put_float(operands[0], modifiers), floating(operands[1]), floating(operands[2])
    smallest, keep_nan = truth(operands[3]), "NAN" in modifiers

    def act(threads: Any, at: Any) -> None:
        x, y = a(threads, at), b(threads, at)
        least, most = (np.minimum, np.maximum) if keep_nan else (np.fmin, np.fmax)
        put(threads, at, np.where(smallest(threads, at), least(x, y), most(x, y)))

    return act


def _mufu(modifiers: list[str], operands: list[str]) -> Action:
    """Approximations of the hardware's; here the value itself, rounded once."""
    kind = modifiers[0]
    if kind in ("RCP64H", "RSQ64H"):
        put, high = _put(operands[0]), integer(operands[1])

        def act(threads: Any, at: Any) -> None:
            value = (high(threads, at).astype(U64) << U64(32)).view(F64)
            result = 1.0 / (value if kind == "RCP64H" else np.sqrt(value))
            put(threads, at, np.asarray(result).view(U64) >> U64(32))

        return act
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
    function, put_float, value = functions[kind], _put_float(operands[0], modifiers), floating(operands[1])
    return lambda threads, at: put_float(threads, at, function(np.asarray(value(threads, at), F64)).astype(F32))


def _double_operation(operation: Callable[..., Any]) -> Callable[[list[str], list[str]], Action]:
    def build(modifiers: list[str], operands: list[str]) -> Action:
        put, values = _put_wide(operands[0]), [double(o) for o in operands[1:]]
        return lambda threads, at: put(
            threads, at, np.asarray(operation(*(v(threads, at) for v in values)), F64).view(U64)
        )

    return build


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
    put, high, low = _put(operands[0]), floating(operands[1]), floating(operands[2])
    kind = "BF16" if "BF16" in modifiers else "F16"
    if "PACK_AB" not in modifiers or "F32" not in modifiers:
        raise UnknownInstructionError("F2FP")
    positive = "RELU" in modifiers

    def half(value: Any) -> Any:
        return _half_bits(np.where(value < 0, F32(0), value) if positive else value, kind)

    return lambda threads, at: put(threads, at, _pack(half(low(threads, at)), half(high(threads, at))))


def _f2f(modifiers: list[str], operands: list[str]) -> Action:
    to, source = [*modifiers, "F32"][:2]
    if source == "F64":
        put_float, value = _put_float(operands[0], modifiers), double(operands[1])
        return lambda threads, at: put_float(threads, at, value(threads, at).astype(F32))
    single = floating(operands[1])
    if to == "F64":
        put_wide = _put_wide(operands[0])
        return lambda threads, at: put_wide(threads, at, single(threads, at).astype(F64).view(U64))
    if to not in ("F16", "BF16") or source != "F32":
        raise UnknownInstructionError("F2F")
    put = _put(operands[0])
    return lambda threads, at: put(threads, at, _half_bits(single(threads, at), to))


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


def _hadd2(modifiers: list[str], operands: list[str]) -> Action:
    if modifiers != ["F32"] or operands[1] != "-RZ":
        raise UnknownInstructionError("HADD2 that is no conversion to float32")
    put, value = _put(operands[0]), _halves(operands[2], False)
    return lambda threads, at: put(threads, at, value(threads, at)[0].view(U32))


def _hfma2(modifiers: list[str], operands: list[str]) -> Action:
    if [o.lstrip("-") for o in operands[1:3]] != ["RZ", "RZ"]:
        raise UnknownInstructionError("HFMA2 that is no move")
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


def _from_integer(modifiers: list[str], operands: list[str]) -> Action:
    if "U64" in modifiers:
        read = wide(operands[1])
    elif "U32" in modifiers:
        read = integer(operands[1])
    elif "S64" in modifiers:
        bits = wide(operands[1])
        read = lambda threads, at: np.asarray(bits(threads, at)).astype(U64).view(I64)  # noqa: E731
    elif "U16" in modifiers:
        word = integer(operands[1])
        read = lambda threads, at: word(threads, at) & 0xFFFF  # noqa: E731
    elif {"S16", "U8", "S8"} & set(modifiers):
        raise UnknownInstructionError(".".join(["I2F", *modifiers]))
    else:
        signed_bits = integer(operands[1])
        read = lambda threads, at: _signed(signed_bits(threads, at))  # noqa: E731
    if "F64" in modifiers:
        put_wide = _put_wide(operands[0])
        return lambda threads, at: put_wide(threads, at, read(threads, at).astype(F64).view(U64))
    put = _put_float(operands[0], [])
    if "U64" not in modifiers:
        return lambda threads, at: put(threads, at, _rounded(np.asarray(read(threads, at)).astype(F64), modifiers))

    def act(threads: Any, at: Any) -> None:
        # 64 bits hold more than a float64: towards 0 first, so that what was cut off still raises the result.
        value = np.asarray(read(threads, at))
        near = value.astype(F32)
        short = near.astype(np.longdouble) < value.astype(np.longdouble)
        put(threads, at, np.where(short & ("RP" in modifiers), np.nextafter(near, F32(np.inf)), near))

    return act


def _to_integer(modifiers: list[str], operands: list[str]) -> Action:
    value = floating(operands[1])
    round_ = np.trunc if "TRUNC" in modifiers else np.floor if "FLOOR" in modifiers else np.rint
    if "U64" in modifiers:
        put_wide = _put_wide(operands[0])

        def act(threads: Any, at: Any) -> None:
            whole = np.clip(np.nan_to_num(round_(value(threads, at).astype(np.longdouble))), 0, 2**64 - 1)
            put_wide(threads, at, whole.astype(U64))

        return act
    if {"S64", "F64", "U16", "S16", "U8", "S8"} & set(modifiers):
        raise UnknownInstructionError("F2I")
    low, high = (0, 2**32 - 1) if "U32" in modifiers else (-(2**31), 2**31 - 1)
    put = _put(operands[0])
    return lambda threads, at: put(
        threads,
        at,
        np.clip(np.nan_to_num(round_(np.asarray(value(threads, at), F64))), low, high).astype(I64) & 0xFFFFFFFF,
    )


def _frnd(modifiers: list[str], operands: list[str]) -> Action:
    round_ = np.trunc if "TRUNC" in modifiers else np.floor if "FLOOR" in modifiers else np.rint
    if "F64" in modifiers:
        put_wide, value = _put_wide(operands[0]), double(operands[1])
        return lambda threads, at: put_wide(threads, at, np.asarray(round_(value(threads, at))).view(U64))
    put, single = _put_float(operands[0], modifiers), floating(operands[1])
    return lambda threads, at: put(threads, at, round_(single(threads, at)))


def _nothing(modifiers: list[str], operands: list[str]) -> Action:
    return lambda threads, at: None


_BUILDERS: dict[str, Callable[[list[str], list[str]], Action]] = {
    "IADD3": _iadd3,
    "VIADD": _viadd,
    "IMAD": _imad,
    "LEA": _lea,
    "LOP3": _lop3,
    "PLOP3": _plop3,
    "SHF": _shf,
    "PRMT": _prmt,
    "POPC": _count_bits,
    "FLO": _highest_bit,
    "BREV": _reversed_bits,
    "MOV": _mov,
    "R2UR": _mov,
    "LDC": _ldc,
    "CS2R": _cs2r,
    "SEL": _sel,
    "FSEL": _fsel,
    **dict.fromkeys(("VIMNMX", "VIMNMX3"), _extreme),
    "VIADDMNMX": lambda modifiers, operands: _extreme(modifiers, operands, plus=True),
    "IABS": _iabs,
    "P2R": _p2r,
    "R2P": _r2p,
    "ISETP": _isetp,
    "FSETP": lambda modifiers, operands: _float_setp(modifiers, operands, floating),
    "DSETP": lambda modifiers, operands: _float_setp(modifiers, operands, double),
    "FCHK": _fchk,
    "FADD": _fadd,
    "FMUL": _fmul,
    "FFMA": _ffma,
    "FMNMX": _fmnmx,
    "MUFU": _mufu,
    "DADD": _double_operation(lambda a, b: a + b),
    "DMUL": _double_operation(lambda a, b: a * b),
    "DFMA": _double_operation(_fma64),
    "F2FP": _f2fp,
    "F2F": _f2f,
    "HADD2": _hadd2,
    "HFMA2": _hfma2,
    "HSET2": _hset2,
    "I2F": _from_integer,
    "I2FP": _from_integer,
    "F2I": _to_integer,
    "FRND": _frnd,
    # Order and caches of memory, which here has neither.
    **dict.fromkeys(("NOP", "MEMBAR", "ERRBAR", "CGAERRBAR", "ENDCOLLECTIVE"), _nothing),
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
