"""Study: one mask, wherever and however it is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from gpu_layers.core.cuda import require_gpu
from gpu_layers.emulator.defaults import cuda_headers
from gpu_layers.emulator.toolchain import find_compiler
from gpu_layers.layers import Dropout
from gpu_layers.ops import dropout_forward, dropout_mask
from gpu_layers.random import Generator
from gpu_layers.runtime.backend import use_backend
from gpu_layers.study.claims import Claim, Criterion, Findings, Results, Study, Table, Text, same
from gpu_layers.study.figures import BLUE, GREY, Canvas, Say, draw
from gpu_layers.study.lab import Lab, on_cpu
from gpu_layers.study.texts import EXACT, FIVE_ERRORS

_N, _P, _SEED, _OFFSET, _SHARDS = 100_003, 0.3, 2026, 41, 8
_DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
#: Of this mask, on every machine: the first 16 digits of the SHA-256 of its packed bits.
_PUBLISHED = "d0ad4b0d210a3e5e"
#: The published answer of Random123 for counter 0 and key 0.
_KNOWN_WORDS = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)

_CLAIMS = (
    Claim(
        "one-mask",
        Text(
            "One mask: the same bits on every backend that is here, for every dtype, in one piece and in eight.",
            "同一个掩码：在本机可用的每个后端上、对每种数据类型、整块计算或分成八片，逐位相同。",
        ),
        r"m_g = f(\mathrm{seed},\ \mathrm{offset},\ g)",
        Text("different checksums in the table", "表中不同校验和的个数"),
        Criterion("==", 1, EXACT),
        "for dtype in (np.float16, np.float64):\n"
        "    layer = gl.Dropout(0.5, generator=gl.Generator(seed=1))\n"
        "    print((layer(np.ones(20, dtype)) != 0).astype(int))\n"
        "print(gl.ops.dropout_mask(20, 0.5, seed=1, offset=0).astype(int))",
    ),
    Claim(
        "published",
        Text("Every machine must give the checksum published here.", "任何机器都必须得到这里公布的校验和。"),
        r"\mathrm{dropped}_g \Leftrightarrow \mathrm{word}_g < \mathrm{round}(p\cdot 2^{32})",
        Text("rows of the table with another checksum", "表中校验和与公布值不同的行数"),
        Criterion("==", 0, EXACT),
        "import hashlib\n\n"
        "mask = gl.ops.dropout_mask(100_003, 0.3, seed=2026, offset=41)\n"
        "print(hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()[:16])",
    ),
    Claim(
        "random123",
        Text(
            "Its random words are those of Philox4x32-10 as its authors published them.",
            "掩码所用的随机字与 Philox4x32-10 作者公布的结果一致。",
        ),
        r"\mathrm{word}_g = \mathrm{philox}(\lfloor g/4 \rfloor,\ \mathrm{offset};\ \mathrm{seed})"
        r"_{\,g\ \mathrm{mod}\ 4}",
        Text("words that differ, of four, found by bisection of p", "四个随机字中不同的个数（对 p 作二分查找得到）"),
        Criterion("==", 0, EXACT),
        "word = 0x6627E8D5  # Random123: counter 0, key 0\n"
        "for threshold in (word, word + 1):\n"
        "    print(gl.ops.dropout_mask(1, threshold / 2**32, seed=0, offset=0))",
    ),
    Claim(
        "frequency",
        Text("It keeps the part 1 - p of the elements.", "它保留的元素比例为 1 - p。"),
        r"\frac{1}{n}\sum_g m_g \approx 1-p \pm \sqrt{\frac{p(1-p)}{n}}",
        Text("distance from 1 - p, in standard errors", "与 1 - p 之差（以标准误差为单位）"),
        Criterion("<=", 5, FIVE_ERRORS),
        "print(gl.ops.dropout_mask(1_000_000, 0.3, seed=1, offset=0).mean())",
    ),
)


def _checksum(mask: np.ndarray) -> str:
    return hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()[:16]


def _backends() -> Iterator[tuple[str, Any, str | None]]:
    """Each backend's name, what places an array for it, and why it is missing."""
    yield "reference", np.asarray, None
    yield "emulated", np.asarray, _reason(lambda: (find_compiler(), cuda_headers()))
    yield "cuda", lambda array: require_gpu().asarray(array), _reason(require_gpu)


def _reason(look: Any) -> str | None:
    try:
        look()
    except RuntimeError as error:
        return str(error)
    return None


def _measure(lab: Lab) -> Results:
    """The table, the words, the frequency."""
    rows: list[list[str | bool | int | None]] = []
    present = list(_backends())
    for number, (backend, place, missing) in enumerate(present):
        for dtype in _DTYPES:
            if missing:
                rows.append([backend, np.dtype(dtype).name, None, None])
                continue
            x = place(np.ones(_N, dtype))
            with use_backend(backend):
                whole = on_cpu(Dropout(_P, generator=Generator(_SEED, _OFFSET))(x)) != 0
                parts, start = [], 0
                # Uneven pieces: no boundary falls between two Philox blocks by luck.
                for piece in np.array_split(np.arange(_N), _SHARDS):
                    y, _ = dropout_forward(x[start : start + piece.size], _P, _SEED, _OFFSET, start=start)
                    parts.append(on_cpu(y) != 0)
                    start += piece.size
            rows.append([backend, np.dtype(dtype).name, _checksum(whole), _checksum(np.concatenate(parts))])
        lab.progress((number + 1) / len(present))
    mask = dropout_mask(_N, _P, _SEED, _OFFSET)
    return {
        "rows": rows,
        "kept": float(mask.mean()),
        "words": [_word(g) for g in range(4)],
        "picture": mask[: 24 * 64],
        "missing": {name: reason for name, _, reason in present if reason},
    }


def _word(g: int) -> int:
    """The random word of element g of call 0 under seed 0: the largest threshold that keeps the element."""
    word = 0
    for bit in reversed(range(32)):
        candidate = word | 1 << bit
        if dropout_mask(1, candidate / 2**32, 0, 0, start=g)[0]:
            word = candidate
    return word


def _conclude(parts: Results) -> Findings:
    results = parts["all"]
    sums = [checksum for row in results["rows"] for checksum in row[2:] if checksum]
    measured = {
        "one-mask": len(set(sums)),
        "published": sum(any(checksum not in (None, _PUBLISHED) for checksum in row[2:]) for row in results["rows"]),
        "random123": sum(word != known for word, known in zip(results["words"], _KNOWN_WORDS, strict=True)),
        "frequency": abs(results["kept"] - (1 - _P)) / np.sqrt(_P * (1 - _P) / _N),
    }
    return Findings(measured, tables=(_table(results),), figures=(_figure(results["picture"]),))


def _table(results: Results) -> Table:
    absent = Text("not on this machine", "本机没有")
    return Table(
        Text(
            f"SHA-256 (16 digits) of the mask of {_N:,} elements, p = {_P}, seed {_SEED}, offset {_OFFSET}",
            f"{_N:,} 个元素的掩码的 SHA-256（前 16 位），p = {_P}，种子 {_SEED}，偏移 {_OFFSET}",
        ),
        (
            Text("backend", "后端"),
            same("dtype"),
            Text("in one piece", "整块"),
            Text(f"in {_SHARDS} shards", f"分成 {_SHARDS} 片"),
        ),
        [[row[0], row[1], *(checksum or absent for checksum in row[2:])] for row in results["rows"]],
    )


@draw(
    "mask",
    Text(
        "The first elements of the mask (dark: kept). An element's number decides, not the piece it lies in.",
        "掩码的前若干元素（深色：保留）。决定去留的是元素的编号，与它落在哪一片无关。",
    ),
    size=(5.4, 2.6),
)
def _figure(figure: Canvas, say: Say, mask: np.ndarray) -> None:
    axes = figure.subplots()
    axes.imshow(mask.reshape(24, 64), cmap="Blues", vmin=-0.2, vmax=1.3, interpolation="none", aspect="equal")
    per_shard = 64 / _SHARDS
    for shard in range(1, _SHARDS):
        axes.axvline(shard * per_shard - 0.5, color=GREY, linewidth=0.6)
    axes.set_xticks([per_shard * (shard + 0.5) - 0.5 for shard in range(_SHARDS)], range(_SHARDS), color=BLUE)
    axes.set_yticks([])
    axes.grid(False)
    axes.set_xlabel(say(Text("an array of 24 rows in eight pieces of columns", "24 行的数组按列分成八片")))


STUDY = Study(
    "mask",
    Text("Is it the same mask everywhere?", "掩码处处相同吗？"),
    Text(
        "A mask is a function of seed, offset and the element's number. Here it is drawn in every way that this "
        "machine can, and compared by checksum.",
        "掩码是种子、偏移和元素编号的函数。这里用本机所能用的每一种方式生成它，并以校验和比较。",
    ),
    _CLAIMS,
    {"all": _measure},
    _conclude,
)
