"""Study: where pooling sends its gradients, and what it costs to remember where they go."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from gpu_layers.core.array import Array, Options
from gpu_layers.layers import AdaptiveAvgPool2d, AdaptiveMaxPool2d, AvgPool2d, MaxPool2d, MaxUnpool2d
from gpu_layers.ops import max_pool_forward
from gpu_layers.study.claims import Claim, Criterion, Findings, Results, Study, Table, Text
from gpu_layers.study.figures import BLUE, GREY, ORANGE, Canvas, Say, draw
from gpu_layers.study.lab import Lab, different_bits, on_cpu
from gpu_layers.study.texts import COUNTED, EXACT

_EXAMPLE = np.array([[1, 3, 2, 1], [4, 6, 5, 0], [7, 2, 9, 8], [3, 1, 4, 5]], np.float64)
_GRADIENT = np.array([[1, 2], [3, 4]], np.float64)
#: By hand.
_MAX, _AVERAGE = np.array([[6, 5], [7, 9.0]]), np.array([[3.5, 2], [3.25, 6.5]])
_MAX_GRADIENT = np.array([[0, 0, 0, 0], [0, 1, 2, 0], [3, 0, 4, 0], [0, 0, 0, 0.0]])
_AVERAGE_GRADIENT = np.kron(_GRADIENT / 4, np.ones((2, 2)))
_MAX_OPTIONS: tuple[Options, ...] = (
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2, "stride": 3},
    {"kernel_size": 3, "stride": 2, "dilation": 2, "padding": 1},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    {"kernel_size": (2, 3), "stride": (1, 2), "padding": "same_upper"},
)
_AVERAGE_OPTIONS: tuple[Options, ...] = (
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 1},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    {"kernel_size": 2, "stride": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False},
    {"kernel_size": 2, "divisor_override": 3},
    {"kernel_size": 2, "divisor_override": 4},
)
_TAPS = {"2 x 2": 2, "3 x 3": 3, "16 x 16": 16, "17 x 17": 17}

_EXAMPLE_CODE = "x = np.array([[[[1.0, 3, 2, 1], [4, 6, 5, 0], [7, 2, 9, 8], [3, 1, 4, 5]]]])\n"
_CLAIMS = (
    Claim(
        "worked-example",
        Text(
            "The 2 x 2 example comes out as by hand: values and gradients, maximum and average.",
            "2 x 2 的例子与手算完全一致：最大池化与平均池化的数值和梯度都相同。",
        ),
        r"y_{\max} = \max_{i \in \mathrm{window}} x_i,\qquad y_{\mathrm{avg}} = \frac{1}{4}\sum_{i} x_i",
        Text("numbers that differ, of 40", "40 个数中不同的个数"),
        Criterion("==", 0, EXACT),
        _EXAMPLE_CODE + "pool = gl.MaxPool2d(2)\n"
        "print(pool(x)[0, 0].tolist(), gl.AvgPool2d(2)(x)[0, 0].tolist())\n"
        "print(pool.backward(np.array([[[[1.0, 2], [3, 4]]]]))[0, 0])",
    ),
    Claim(
        "gradients-land",
        Text(
            "Every gradient lands where moving x moves y: overlaps, gaps, padding and dilation included.",
            "每个梯度都落在“改变 x 会改变 y”的位置上，窗口重叠、间隔、填充与空洞的情形都包括在内。",
        ),
        r"\frac{\partial L}{\partial x_i} \approx \frac{L(x+h\,e_i)-L(x-h\,e_i)}{2h}",
        Text(
            "largest difference from finite differences, 17 layers, float64",
            "与有限差分的最大差值（17 种层配置，float64）",
        ),
        Criterion(
            "<=",
            1e-8,
            Text(
                "the layers are linear around x without ties: rounding 1e-16 over a step of 1e-4",
                "没有并列最大值时，层在 x 附近是线性的：舍入误差 1e-16 除以步长 1e-4",
            ),
        ),
        "x = np.random.default_rng(0).standard_normal((1, 1, 5, 5))\n"
        "pool, dy = gl.MaxPool2d(3, stride=1), np.ones((1, 1, 3, 3))\n"
        "pool(x)\n"
        "print(pool.backward(dy)[0, 0].astype(int))\n"
        "print(((pool(x + 1e-6 * (x == x.max())) - pool(x)) * dy).sum() / 1e-6)  # the largest element, moved",
    ),
    Claim(
        "maximum-keeps-sums",
        Text("Max pooling always preserves the sum of gradients.", "最大池化总是保持梯度之和。"),
        r"\sum_i \frac{\partial L}{\partial x_i} = \sum_o dy_o",
        Text("layers that do not, of nine, whole-number gradients", "九种层中不满足者的个数（整数梯度）"),
        Criterion("==", 0, EXACT),
        "x = np.random.default_rng(0).standard_normal((1, 1, 9, 9))\n"
        "pool = gl.MaxPool2d(3, stride=2, padding=1)\n"
        "dy = np.ones_like(pool(x))\n"
        "print(pool.backward(dy).sum(), dy.sum())",
    ),
    Claim(
        "average-keeps-sums",
        Text(
            "Average pooling does so if its divisor d is the number t of elements in the window: not if zeros of the "
            "padding count too, or another divisor is given.",
            "平均池化在除数 d 等于窗口内元素数 t 时也保持；若填充的零计入除数，或另行指定除数，则不保持。",
        ),
        r"\sum_i \frac{\partial L}{\partial x_i} = \sum_o dy_o\,"
        r"\frac{t_o}{d_o}",
        Text("layers that do otherwise, of nine", "九种层中与规则不符者的个数"),
        Criterion(
            "==", 0, Text("the same sum up to 1e-12, or not, as the rule says", "按规则判断和是否相同（容差 1e-12）")
        ),
        "x = np.ones((1, 1, 9, 9))\n"
        "for include in (True, False):\n"
        "    pool = gl.AvgPool2d(3, stride=2, padding=1, count_include_pad=include)\n"
        "    dy = np.ones_like(pool(x))\n"
        "    print(include, pool.backward(dy).sum() / dy.sum())",
    ),
    Claim(
        "ties-and-nan",
        Text(
            "Of equal maxima the first wins, of several NaN the last; padding is never chosen, even among -inf.",
            "最大值并列时取第一个，有多个 NaN 时取最后一个；填充永远不会被选中，即使窗口内全是负无穷。",
        ),
        r"i^* = \min\{i : x_i = \max x\},\qquad i^* = \max\{i : x_i = \mathrm{NaN}\}",
        Text("windows with another index, of seven", "七个窗口中索引不符者的个数"),
        Criterion("==", 0, EXACT),
        "nan = np.nan\n"
        "for window in ([3, 3, 1, 3], [nan, 1, nan, 2], [-np.inf] * 4):\n"
        "    y, index = gl.MaxPool1d(4, return_indices=True)(np.array([[window]], float))\n"
        "    print(window, y.item(), index.item())",
    ),
    Claim(
        "scatter-is-gather",
        Text(
            "Sending gradients out by the int64 indices and collecting them at each input give the same bits.",
            "按 int64 索引散射梯度，与在每个输入处收集梯度，结果逐位相同。",
        ),
        r"\frac{\partial L}{\partial x_i} = \sum_{o\,:\,i^*(o)=i} dy_o",
        Text(
            "elements that differ, eight layers, float16 to float64, whole-number gradients",
            "不同的元素个数（八种层，float16 至 float64，整数梯度）",
        ),
        Criterion("==", 0, EXACT),
        "x = np.random.default_rng(0).standard_normal((2, 3, 8, 8))\n"
        "pool = gl.MaxPool2d(2, return_indices=True)\n"
        "y, indices = pool(x)\n"
        "print((gl.MaxUnpool2d(2)(y, indices) == pool.backward(y)).all())",
    ),
    Claim(
        "one-byte",
        Text(
            "What is kept for backward is one byte an output, not eight, for windows of up to 256 elements.",
            "窗口不超过 256 个元素时，为反向传播保存的索引每个输出只占 1 字节，而不是 8 字节。",
        ),
        r"\frac{4\cdot 2+2+8}{4\cdot 2+2+1} = \frac{18}{11} \approx 1.64",
        Text("bytes kept for each output, 2 x 2 to 16 x 16", "每个输出保存的字节数（2 x 2 至 16 x 16）"),
        Criterion("==", 1, COUNTED),
        "x = np.ones((8, 64, 56, 56), np.float16)\n"
        "y, saved = gl.ops.max_pool_forward(x, (2, 2))\n"
        "y, indices = gl.MaxPool2d(2, return_indices=True)(x)\n"
        "print(saved.argmax.nbytes / y.size, indices.nbytes / y.size)",
    ),
)


def _plane(rng: np.random.Generator, size: int) -> np.ndarray:
    """Numbers, no two closer than 1."""
    return rng.permutation(size * size).reshape(1, 1, size, size).astype(np.float64)


def _max_layers() -> list[tuple[str, Any]]:
    layers: list[tuple[str, Any]] = [(_said("MaxPool2d", one), MaxPool2d(**one)) for one in _MAX_OPTIONS]
    return [*layers, *((f"AdaptiveMaxPool2d({size})", AdaptiveMaxPool2d(size)) for size in (3, 4))]


def _average_layers() -> list[tuple[str, Options, Any]]:
    layers: list[tuple[str, Options, Any]] = [
        (_said("AvgPool2d", one), one, AvgPool2d(**one)) for one in _AVERAGE_OPTIONS
    ]
    return [*layers, ("AdaptiveAvgPool2d(3)", {}, AdaptiveAvgPool2d(3))]


def _said(name: str, options: Options) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in options.items())})"


def _whole_gradient(rng: np.random.Generator, y: Array) -> np.ndarray:
    return rng.integers(1, 9, y.shape).astype(np.dtype(y.dtype))


def _measure(lab: Lab) -> Results:
    """All of it: it takes moments."""
    example = lab.place(_EXAMPLE[None, None])
    wrong = 0
    for layer, value, gradient in ((MaxPool2d(2), _MAX, _MAX_GRADIENT), (AvgPool2d(2), _AVERAGE, _AVERAGE_GRADIENT)):
        wrong += int((on_cpu(layer(example))[0, 0] != value).sum())
        wrong += int((on_cpu(layer.backward(lab.place(_GRADIENT[None, None])))[0, 0] != gradient).sum())
    sums = _sums(lab)
    return {
        "worked-example": wrong,
        "gradients-land": _finite_differences(lab),
        "maximum-keeps-sums": sum(not keeps for name, _, keeps, _ in sums if "Max" in name),
        "average-keeps-sums": sum(keeps != expected for name, _, keeps, expected in sums if "Avg" in name),
        "ties-and-nan": _wrong_ties(lab),
        "scatter-is-gather": _scattered(lab),
        "sums": sums,
        "bytes": _bytes(lab),
    }


def _finite_differences(lab: Lab) -> float:
    rng, size, step = np.random.default_rng(2), 6, 1e-4
    layers = [layer for _, layer in _max_layers()] + [layer for _, _, layer in _average_layers()]
    largest = 0.0
    for layer in layers:
        x = _plane(rng, size)
        dy = rng.standard_normal(on_cpu(layer(lab.place(x))).shape)
        dx = on_cpu(layer.backward(lab.place(dy)))
        # All 36 directions as one batch.
        moved = step * np.eye(size * size).reshape(size * size, 1, size, size)
        up, down = (on_cpu(layer(lab.place(x + sign * moved))) for sign in (1, -1))
        slopes = ((up - down) * dy).sum(axis=(1, 2, 3)) / (2 * step)
        largest = max(largest, float(np.abs(slopes.reshape(size, size) - dx[0, 0]).max()))
    return largest


def _sums(lab: Lab) -> list[tuple[str, float, bool, bool]]:
    """Each layer, the sum of its gradients over that of what came in, whether they agree, and whether they should."""
    rng, rows = np.random.default_rng(3), []
    every: list[tuple[str, Options, Any]] = [(name, {}, layer) for name, layer in _max_layers()] + _average_layers()
    for name, options, layer in every:
        y = layer(lab.place(_plane(rng, 9)))
        dy = _whole_gradient(rng, y)
        given, kept = float(dy.sum()), float(on_cpu(layer.backward(lab.place(dy))).sum())
        keeps = given == kept if "Max" in name else abs(kept / given - 1) < 1e-12
        counts_padding = bool(options.get("padding")) and options.get("count_include_pad", True)
        other_divisor = options.get("divisor_override", 4) != 4
        rows.append((name, kept / given, keeps, not (counts_padding or other_divisor)))
    return rows


def _wrong_ties(lab: Lab) -> int:
    nan, inf = np.nan, np.inf
    cases = (
        ([3, 3, 1, 3], 0),
        ([1, 3, 3, 2], 1),
        ([nan, 1, nan, 2], 2),
        ([nan, inf, 1, 2], 0),
        ([-inf, -inf, -inf, -inf], 0),
        ([-0.0, 0.0, -0.0, 0.0], 0),
    )
    wrong = 0
    for window, expected in cases:
        layer = MaxPool2d((1, 4), return_indices=True)
        _, index = layer(lab.place(np.array(window, np.float64).reshape(1, 1, 1, 4)))
        wrong += int(on_cpu(index).item()) != expected
    # Of nine windows eight reach into the padding.
    layer = MaxPool2d(3, stride=2, padding=1, return_indices=True)
    y, index = layer(lab.place(np.full((1, 1, 5, 5), -inf)))
    corners = np.array([[0, 1, 3], [5, 6, 8], [15, 16, 18]])
    return wrong + bool((on_cpu(index)[0, 0] != corners).any() or (on_cpu(y) != -inf).any())


def _scattered(lab: Lab) -> int:
    rng, different = np.random.default_rng(4), 0
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64):
        for options in _MAX_OPTIONS:
            x = lab.place(rng.integers(-50, 50, (2, 3, 9, 8)).astype(dtype))
            layer = MaxPool2d(return_indices=True, **options)
            y, indices = layer(x)
            dy = _whole_gradient(rng, y)
            # In float64: whole numbers add up to the same whatever the order.
            expected = np.zeros((6, 72))
            np.add.at(
                expected, (np.arange(6)[:, None], on_cpu(indices).reshape(6, -1)), dy.reshape(6, -1).astype(float)
            )
            different += different_bits(layer.backward(lab.place(dy)), expected.reshape(x.shape).astype(dtype))
        layer = MaxPool2d(2, return_indices=True)
        y, indices = layer(x)
        different += different_bits(layer.backward(y), MaxUnpool2d(2)(y, indices, x.shape))
    return different


def _bytes(lab: Lab) -> list[tuple[str, float, float]]:
    """Each window: bytes an output kept for backward, and as int64 indices."""
    rows = []
    for name, kernel in _TAPS.items():
        x = lab.place(np.zeros((1, 2, 2 * kernel, 2 * kernel), np.float16))
        y, saved = max_pool_forward(x, (kernel, kernel))
        _, indices = MaxPool2d(kernel, return_indices=True)(x)
        rows.append((name, saved.argmax.nbytes / y.size, indices.nbytes / y.size))
    return rows


def _conclude(parts: Results) -> Findings:
    results = parts["all"]
    measured = {name: results[name] for name in results if name not in ("sums", "bytes")}
    measured["one-byte"] = max(kept for name, kept, _ in results["bytes"] if name != "17 x 17")
    return Findings(
        measured,
        tables=(_sum_table(results["sums"]), _byte_table(results["bytes"])),
        figures=(_example_figure(), _byte_figure(results["bytes"])),
    )


def _sum_table(sums: list[tuple[str, float, bool, bool]]) -> Table:
    return Table(
        Text("Sum of the gradients of x over that of y", "x 的梯度之和与 y 的梯度之和的比值"),
        (Text("layer", "层"), Text("ratio", "比值"), Text("preserved", "是否保持")),
        [[name, f"{ratio:.4g}", Text("yes", "是") if keeps else Text("no", "否")] for name, ratio, keeps, _ in sums],
    )


def _traffic(kernel: int, index: float) -> float:
    """Bytes that cross the memory bus for each output: window and result in half precision, and the index."""
    return 2 * kernel**2 + 2 + index


def _byte_table(rows: list[tuple[str, float, float]]) -> Table:
    return Table(
        Text(
            "Bytes an output that are kept for backward, and bytes that the forward must move (float16, stride = "
            "window; counted, not timed)",
            "每个输出为反向传播保存的字节数，以及前向必须搬运的字节数（float16，步幅等于窗口；为计数，非计时）",
        ),
        (
            Text("window", "窗口"),
            Text("kept", "实际保存"),
            Text("as int64", "若用 int64"),
            Text("moved", "搬运量"),
            Text("with int64", "若用 int64"),
            Text("ratio", "比值"),
        ),
        [
            [
                name,
                f"{kept:g}",
                f"{wide:g}",
                f"{_traffic(_TAPS[name], kept):g}",
                f"{_traffic(_TAPS[name], wide):g}",
                f"{_traffic(_TAPS[name], wide) / _traffic(_TAPS[name], kept):.2f}",
            ]
            for name, kept, wide in rows
        ],
    )


@draw(
    "example",
    Text(
        "The worked example: 2 x 2 windows, and the gradients (1, 2; 3, 4) on their way back.",
        "手算例子：2 x 2 窗口，以及回传的梯度 (1, 2; 3, 4)。",
    ),
    size=(4.6, 4.8),
)
def _example_figure(figure: Canvas, say: Say) -> None:
    panels = (
        (Text("x, maxima marked", "x（标出最大值）"), _EXAMPLE, _MAX_GRADIENT != 0),
        (Text("gradient, maximum", "梯度（最大池化）"), _MAX_GRADIENT, _MAX_GRADIENT != 0),
        (Text("y, maximum", "y（最大池化）"), _MAX, np.ones((2, 2), bool)),
        (Text("gradient, average", "梯度（平均池化）"), _AVERAGE_GRADIENT, np.ones((4, 4), bool)),
    )
    for axes, (title, values, marked) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        size = len(values)
        axes.imshow(marked, cmap="Blues", vmin=0, vmax=4, extent=(0, size, size, 0), interpolation="none")
        for row in range(size):
            for column in range(size):
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    f"{values[row, column]:g}",
                    ha="center",
                    va="center",
                    color=BLUE if marked[row, column] else GREY,
                )
        axes.set_xticks(range(size + 1), [])
        axes.set_yticks(range(size + 1), [])
        axes.grid(alpha=0.15)
        for number in range(0, size + 1, 2 if size == 4 else 1):
            axes.axhline(number, color="black", linewidth=1)
            axes.axvline(number, color="black", linewidth=1)
        axes.tick_params(length=0)
        axes.set_title(say(title))


@draw(
    "bytes",
    Text(
        "Bytes that the forward pass must move, with the index of each maximum kept as the number of the element "
        "in its window or as int64 (float16, counted).",
        "前向必须搬运的字节数：最大值的位置存为窗口内编号或 int64 索引（float16，为计数结果）。",
    ),
    size=(5.4, 3.0),
)
def _byte_figure(figure: Canvas, say: Say, rows: list[tuple[str, float, float]]) -> None:
    axes = figure.subplots()
    at = np.arange(len(rows))
    for shift, kept, colour, name in (
        (-0.2, [row[1] for row in rows], BLUE, Text("tap numbers", "窗口内编号")),
        (0.2, [row[2] for row in rows], ORANGE, Text("int64 indices", "int64 索引")),
    ):
        kernels = [_TAPS[row[0]] for row in rows]
        ratios = [_traffic(*one) / _traffic(one[0], 0) for one in zip(kernels, kept, strict=True)]
        axes.bar(at + shift, ratios, width=0.38, color=colour, alpha=0.7, label=say(name))
        for position, ratio in zip(at + shift, ratios, strict=True):
            axes.annotate(
                f"{ratio:.2f}", (position, ratio), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=9
            )
    axes.set_xticks(at, [row[0] for row in rows])
    axes.set_xlabel(say(Text("window", "窗口")))
    axes.set_ylabel(say(Text("bytes moved, without index = 1", "搬运字节数（无索引 = 1）")))
    axes.set_ylim(0, 2.1)
    axes.legend()


STUDY = Study(
    "pooling",
    Text("Where do pooling's gradients go?", "池化的梯度去了哪里？"),
    Text(
        "A worked example, the gradients of seventeen layers against finite differences, their sums, ties and NaN, and "
        "the price of remembering where a maximum was.",
        "一个手算例子，十七种层的梯度与有限差分的对比，梯度之和，并列与 NaN，以及记住最大值位置的代价。",
    ),
    _CLAIMS,
    {"all": _measure},
    _conclude,
)
