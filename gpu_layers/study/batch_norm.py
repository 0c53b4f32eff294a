"""Study: what batch norm does in training and in evaluation, and what its gradient is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gpu_layers.layers import BatchNorm1d
from gpu_layers.study.claims import Claim, Criterion, Findings, Results, Study, Table, Text, same
from gpu_layers.study.figures import BLUE, GREEN, GREY, ORANGE, Canvas, Say, draw
from gpu_layers.study.lab import Lab, on_cpu
from gpu_layers.study.texts import COUNTED, FIVE_ERRORS, ROUNDING

_MOMENTA: tuple[float | None, ...] = (0.1, 0.01, None)
_COLOURS = (BLUE, ORANGE, GREEN)
_LEFT = 0.01
_COUNTS = (2, 3, 4, 6, 8, 16, 32, 64)

_CLAIMS = (
    Claim(
        "training",
        Text(
            "Training normalises each channel by the mean and the biased variance of the batch.",
            "训练时，每个通道按本批次的均值和有偏方差归一化。",
        ),
        r"y = \gamma\,\frac{x-\mu_B}{\sqrt{\sigma_B^2+\epsilon}}+\beta,\qquad"
        r"\sigma_B^2 = \frac{1}{N}\sum_i (x_i-\mu_B)^2",
        Text("largest difference from the formula, float64", "与公式的最大差值（float64）"),
        Criterion("<=", 1e-12, ROUNDING),
        'x = 5 + 3 * np.random.default_rng(0).standard_normal((64, 2))\ny = gl.BatchNorm1d(2, dtype="float64")(x)\n'
        "print(y.mean(axis=0).round(12), y.var(axis=0))",
    ),
    Claim(
        "evaluation",
        Text(
            "Evaluation normalises by the moving averages: a sample's result no longer depends on its batch.",
            "推理时按滑动平均归一化：一个样本的结果不再取决于它所在的批次。",
        ),
        r"y = \gamma\,\frac{x-\mu_{\mathrm{moving}}}{\sqrt{\sigma_{\mathrm{moving}}^2+\epsilon}}+\beta",
        Text(
            "largest difference from the formula, and between a sample alone and in its batch, float64",
            "与公式的最大差值，以及样本单独计算与在批次中计算的最大差值（float64）",
        ),
        Criterion("<=", 1e-12, ROUNDING),
        "x = 5 + 3 * np.random.default_rng(0).standard_normal((64, 2))\n"
        'bn = gl.BatchNorm1d(2, dtype="float64")\n'
        "bn(x)\n"
        "bn.eval()\n"
        "print((bn(x)[:1] == bn(x[:1])).all())",
    ),
    Claim(
        "steps",
        Text(
            "The moving average forgets its start like a power of 1 - momentum: 99 % of the way takes 44 batches at "
            "0.1, 459 at 0.01, and one if cumulative.",
            "滑动平均对初值的遗忘按 (1 - 动量) 的幂次衰减：走完 99% 的路程，动量 0.1 需 44 个批次，0.01 需 459 个，"
            "累积平均只需一个。",
        ),
        r"\mu_t - \mu = (1-\alpha)^t\,(\mu_0-\mu)\ \Rightarrow\ "
        r"t = \left\lceil\frac{\ln 0.01}{\ln(1-\alpha)}\right\rceil",
        Text("batches too many or too few, all three momenta", "三种动量下多出或不足的批次数"),
        Criterion("==", 0, COUNTED),
        "x = 5 + 3 * np.random.default_rng(0).standard_normal((64, 1))\n"
        'bn = gl.BatchNorm1d(1, momentum=0.1, dtype="float64")\n'
        "for step in range(44):\n"
        "    bn(x)\n"
        'print(bn.buffers["running_mean"] / x.mean())',
    ),
    Claim(
        "noise",
        Text(
            "A momentum leaves noise that never ends; the cumulative average's falls with the number of batches.",
            "带动量的滑动平均，其噪声永不消失；累积平均的噪声随批次数增加而下降。",
        ),
        r"\mathrm{Var}[\mu_t] = \frac{\sigma^2}{N}\cdot\frac{\alpha}{2-\alpha}\left(1-(1-\alpha)^{2t}\right)"
        r",\quad\frac{\sigma^2}{N\,t}",
        Text(
            "distance of the variance from the formula, in standard errors, largest of three",
            "方差与公式之差（以标准误差为单位，取三个中的最大值）",
        ),
        Criterion("<=", 5, FIVE_ERRORS),
        "rng = np.random.default_rng(0)\n"
        'bn = gl.BatchNorm1d(2000, momentum=0.1, dtype="float64")\n'
        "for step in range(60):\n"
        "    bn(rng.standard_normal((8, 2000)))\n"
        'print(bn.buffers["running_mean"].var(), 1 / 8 * 0.1 / 1.9)',
    ),
    Claim(
        "gradient",
        Text(
            "The gradient has three terms, and needs all of them: x also moves the mean and the variance of its batch.",
            "梯度有三项，缺一不可：x 还会改变所在批次的均值和方差。",
        ),
        r"\frac{\partial L}{\partial x} = \frac{\gamma}{\sqrt{\sigma_B^2+\epsilon}}"
        r"\left(dy - \overline{dy} - \hat{x}\ \overline{dy\,\hat{x}}\right)",
        Text(
            "largest difference from finite differences, relative to the largest gradient",
            "与有限差分的最大差值（相对于最大梯度）",
        ),
        Criterion(
            "<=",
            1e-7,
            Text(
                "central differences of step 1e-5 in float64 are off by some 1e-9",
                "float64 下步长 1e-5 的中心差分，误差约为 1e-9",
            ),
        ),
        "rng = np.random.default_rng(0)\n"
        "x, dy = rng.standard_normal((2, 8, 1))\n"
        'bn = gl.BatchNorm1d(1, dtype="float64")\n'
        "bn(x)\n"
        "print(bn.backward(dy).sum(), (bn.backward(dy) * x).sum())",
    ),
    Claim(
        "two-directions",
        Text(
            "Of the N directions of a channel's gradient two are lost: a common shift and a common factor change "
            "nothing. With two samples nothing is left, and with one there is not even a variance.",
            "一个通道的梯度有 N 个方向，其中两个必然丢失：整体平移和整体缩放都不改变输出。"
            "两个样本时梯度为零，一个样本时连方差都无从谈起。",
        ),
        r"E\left[\frac{\sigma_B^2\,\Vert\partial L/\partial x\Vert^2}{\Vert dy\Vert^2}\right] = \frac{N-2}{N}",
        Text(
            "distance from (N-2)/N, in standard errors, largest for N = 2 to 64",
            "与 (N-2)/N 之差（以标准误差为单位，N 取 2 至 64 中的最大值）",
        ),
        Criterion("<=", 5, FIVE_ERRORS),
        "rng = np.random.default_rng(0)\n"
        "for n in (2, 3, 64):\n"
        '    bn, x, dy = gl.BatchNorm1d(1000, dtype="float64"), *rng.standard_normal((2, n, 1000))\n'
        "    bn(x)\n"
        "    print(n, ((bn.backward(dy) ** 2).sum(0) * x.var(0) / (dy**2).sum(0)).mean())",
    ),
    Claim(
        "one-sample",
        Text(
            "One value a channel is refused in training; two give +1 and -1, whatever they were.",
            "训练时每个通道只有一个值会被拒绝；两个值则总是输出 +1 和 -1，无论原来是多少。",
        ),
        r"N=2:\quad y = \pm\frac{d/2}{\sqrt{d^2/4+\epsilon}} \approx \pm 1",
        Text(
            "largest difference of |y| from 1 for two values; infinite if one value is accepted",
            "两个值时 |y| 与 1 的最大差值；若接受了单个值，则记为无穷大",
        ),
        Criterion("<=", 1e-4, Text("eps = 1e-5 beside distances of at least 1", "eps = 1e-5，而两值之差至少为 1")),
        "print(gl.BatchNorm1d(3)(np.array([[1, 5, -7], [2, 900, 3]], np.float32)).round(3))\n"
        "try:\n"
        "    gl.BatchNorm1d(3)(np.ones((1, 3), np.float32))\n"
        "except ValueError as error:\n"
        "    print(error)",
    ),
    Claim(
        "unbiased",
        Text(
            "The moving variance takes the unbiased one: N/(N-1) times what the batch was normalised by.",
            "滑动方差累积的是无偏方差：等于归一化所用方差的 N/(N-1) 倍。",
        ),
        r"\sigma_{\mathrm{moving}}^2 \leftarrow (1-\alpha)\,\sigma_{\mathrm{moving}}^2"
        r" + \alpha\,\frac{N}{N-1}\,\sigma_B^2",
        Text(
            "largest relative difference from N/(N-1) times the biased variance",
            "与有偏方差的 N/(N-1) 倍之间的最大相对差",
        ),
        Criterion("<=", 1e-12, ROUNDING),
        "x = np.random.default_rng(0).standard_normal((5, 1))\n"
        'bn = gl.BatchNorm1d(1, momentum=1.0, dtype="float64")\n'
        "bn(x)\n"
        'print(bn.buffers["running_var"] / x.var(), 5 / 4)',
    ),
)


def _layer(lab: Lab, channels: int, **options: Any) -> BatchNorm1d:
    layer = BatchNorm1d(channels, dtype="float64", **options)
    layer.to(lab.device)
    return layer


def _statistics(lab: Lab) -> Results:
    """Modes, refusals and the moving variance."""
    rng = np.random.default_rng(1)
    x = 5 + 3 * rng.standard_normal((37, 6))
    layer = _layer(lab, 6)
    layer.parameters["weight"][...] = lab.place(rng.uniform(0.5, 2, 6))
    layer.parameters["bias"][...] = lab.place(rng.standard_normal(6))
    gamma, beta = on_cpu(layer.parameters["weight"]), on_cpu(layer.parameters["bias"])
    expected = gamma * (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + layer.eps) + beta
    measured = {"training": float(np.abs(on_cpu(layer(lab.place(x))) - expected).max())}
    layer.eval()
    mean, var = on_cpu(layer.buffers["running_mean"]), on_cpu(layer.buffers["running_var"])
    y = on_cpu(layer(lab.place(x)))
    alone = np.concatenate([on_cpu(layer(lab.place(x[i : i + 1]))) for i in range(len(x))])
    measured["evaluation"] = max(
        float(np.abs(y - (gamma * (x - mean) / np.sqrt(var + layer.eps) + beta)).max()), float(np.abs(y - alone).max())
    )
    ratios = []
    for count in _COUNTS:
        newest, batch = _layer(lab, 6, momentum=1.0), rng.standard_normal((count, 6))
        newest(lab.place(batch))
        ratios.append(on_cpu(newest.buffers["running_var"]) / (count / (count - 1) * batch.var(axis=0)))
    measured["unbiased"] = float(np.abs(np.array(ratios) - 1).max())
    measured["one-sample"] = _two_values(lab)
    return measured


def _two_values(lab: Lab) -> float:
    try:
        _layer(lab, 3)(lab.place(np.ones((1, 3))))
    except ValueError:
        first = np.array([-3.0, 0.0, 1000.0])
        y = on_cpu(_layer(lab, 3)(lab.place(np.stack([first, first + np.array([1.0, -40.0, 7.0])]))))
        return float(np.abs(np.abs(y) - 1).max())
    return math.inf


def _approach(lab: Lab) -> Results:
    """How fast moving averages arrive, and how much they keep shaking."""
    steps, batch = 500, lab.place(5 + 3 * np.random.default_rng(2).standard_normal((64, 1)))
    true = float(batch.mean())
    left = {}
    for momentum in _MOMENTA:
        layer = _layer(lab, 1, momentum=momentum)
        values = [1.0]
        for _ in range(steps):
            layer(batch)
            values.append(abs(float(layer.buffers["running_mean"][0]) - true) / abs(true))
        left[momentum] = values
    channels, size = lab.choose(2000, 1000), 8
    noise = {}
    for number, momentum in enumerate(_MOMENTA):
        rng, layer = np.random.default_rng(3), _layer(lab, channels, momentum=momentum)
        count = lab.choose(300, 60)
        for step in range(count):
            layer(lab.place(rng.standard_normal((size, channels))))
            lab.progress((number + step / count) / len(_MOMENTA))
        if momentum is None:
            theory = 1 / (size * count)
        else:
            theory = momentum / (2 - momentum) * (1 - (1 - momentum) ** (2 * count)) / size
        noise[momentum] = (float(on_cpu(layer.buffers["running_mean"]).var(ddof=1)), theory)
    return {"left": left, "noise": noise, "noise error": math.sqrt(2 / (channels - 1)), "batches": count}


def _gradients(lab: Lab) -> Results:
    """The backward against finite differences, and by how much it fails with terms left out."""
    rng = np.random.default_rng(4)
    x, dy = rng.standard_normal((2, 9, 4)) * 2 + 1
    layer = _layer(lab, 4)
    layer.parameters["weight"][...] = lab.place(rng.uniform(0.5, 2, 4))
    layer(lab.place(x))
    computed = on_cpu(layer.backward(lab.place(dy)))

    def loss(values: np.ndarray) -> np.ndarray:
        return (on_cpu(layer(lab.place(values))) * dy).sum(axis=0)

    numeric, step = np.empty_like(x), 1e-5
    for row in range(len(x)):
        shift = np.zeros_like(x)
        shift[row] = step
        # A channel depends on its own column only: all columns at once.
        numeric[row] = (loss(x + shift) - loss(x - shift)) / (2 * step)
    factor = on_cpu(layer.parameters["weight"]) / np.sqrt(x.var(axis=0) + layer.eps)
    normal = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + layer.eps)
    terms = (dy, -dy.mean(axis=0), -normal * (dy * normal).mean(axis=0))
    kept = {"dy": terms[:1], "dy, mean": terms[:2], "dy, variance": terms[::2], "all": terms}
    largest = np.abs(numeric).max()
    return {
        "gradient": float(np.abs(computed - numeric).max() / largest),
        "left out": {
            name: float(np.abs(factor * sum(np.broadcast_to(term, x.shape) for term in some) - numeric).max() / largest)
            for name, some in kept.items()
        },
        "lost": _lost_directions(lab),
    }


def _lost_directions(lab: Lab) -> list[tuple[int, float, float]]:
    """For each N: the mean of what is left of the gradient, and its standard error."""
    rng, channels, rows = np.random.default_rng(5), lab.choose(4000, 1000), []
    for count in _COUNTS:
        x, dy = rng.standard_normal((2, count, channels))
        layer = _layer(lab, channels, eps=1e-30)
        layer(lab.place(x))
        dx = on_cpu(layer.backward(lab.place(dy)))
        left = (dx**2).sum(axis=0) * x.var(axis=0) / (dy**2).sum(axis=0)
        rows.append((count, float(left.mean()), float(left.std(ddof=1)) / math.sqrt(channels)))
    return rows


def _steps_needed(momentum: float | None) -> int:
    return 1 if momentum is None else math.ceil(math.log(_LEFT) / math.log(1 - momentum))


def _steps_taken(left: list[float]) -> int:
    return next((step for step, part in enumerate(left) if part <= _LEFT), len(left))


def _conclude(parts: Results) -> Findings:
    statistics, approach, gradients = parts["statistics"], parts["approach"], parts["gradients"]
    measured = {
        **statistics,
        "steps": sum(abs(_steps_taken(left) - _steps_needed(momentum)) for momentum, left in approach["left"].items()),
        "noise": max(abs(seen / theory - 1) / approach["noise error"] for seen, theory in approach["noise"].values()),
        "gradient": gradients["gradient"],
        # Rounding alone, where nothing is left of a gradient, is no deviation.
        "two-directions": max(abs(mean - (n - 2) / n) / max(error, 1e-12) for n, mean, error in gradients["lost"]),
    }
    return Findings(
        measured,
        tables=(_momentum_table(approach), _term_table(gradients["left out"])),
        figures=(_approach_figure(approach["left"]), _direction_figure(gradients["lost"])),
    )


def _momentum_name(momentum: float | None) -> Text:
    return Text("cumulative", "累积平均") if momentum is None else same(f"{momentum:g}")


def _momentum_table(approach: Results) -> Table:
    return Table(
        Text(
            f"Batches until 1 % of the start is left, and the variance of the mean after {approach['batches']} batches "
            "of 8",
            f"初值影响降到 1% 所需的批次数，以及 {approach['batches']} 个大小为 8 的批次之后均值的方差",
        ),
        (
            Text("momentum", "动量"),
            Text("batches, formula", "批次数（公式）"),
            Text("batches, measured", "批次数（实测）"),
            Text("variance, formula", "方差（公式）"),
            Text("variance, measured", "方差（实测）"),
        ),
        [
            [
                _momentum_name(momentum),
                _steps_needed(momentum),
                _steps_taken(approach["left"][momentum]),
                f"{theory:.3g}",
                f"{seen:.3g}",
            ]
            for momentum, (seen, theory) in approach["noise"].items()
        ],
    )


def _term_table(left_out: Mapping[str, float]) -> Table:
    names = {
        "dy": Text("dy alone", "仅 dy"),
        "dy, mean": Text("without that of the variance", "缺方差项"),
        "dy, variance": Text("without that of the mean", "缺均值项"),
        "all": Text("all three", "三项齐全"),
    }
    return Table(
        Text("The gradient with terms left out, against finite differences", "缺少某些项时的梯度与有限差分之差"),
        (Text("terms", "保留的项"), Text("largest relative error", "最大相对误差")),
        [[names[key], f"{error:.2g}"] for key, error in left_out.items()],
    )


@draw(
    "approach",
    Text(
        "How the moving mean forgets its start, and when 1 % is left.", "滑动均值如何遗忘初值；圆点标出残留 1% 的时刻。"
    ),
)
def _approach_figure(figure: Canvas, say: Say, left: Mapping[float | None, list[float]]) -> None:
    axes = figure.subplots()
    for (momentum, values), colour in zip(left.items(), _COLOURS, strict=True):
        label = f"{say(Text('momentum', '动量'))} {momentum:g}" if momentum else say(_momentum_name(None))
        # Below rounding there is nothing to see.
        at = [step for step, part in enumerate(values) if part > 1e-9]
        axes.semilogy(at, [values[step] for step in at], color=colour, label=label)
        taken = _steps_taken(values)
        axes.plot(taken, max(values[taken], 1e-4), "o", color=colour)
        axes.annotate(
            str(taken), (taken, max(values[taken], 1e-4)), xytext=(6, 4), textcoords="offset points", color=colour
        )
    axes.axhline(_LEFT, color=GREY, linestyle="--", linewidth=1)
    axes.set_ylim(1e-4, 2)
    axes.set_xlabel(say(Text("batches", "批次数")))
    axes.set_ylabel(say(Text("part of the start that is left", "初值影响的残留比例")))
    axes.legend()


@draw(
    "directions",
    Text(
        "What normalising leaves of a gradient: with two samples, nothing.",
        "归一化之后梯度还剩多少：只有两个样本时，什么也不剩。",
    ),
    size=(5.4, 3.0),
)
def _direction_figure(figure: Canvas, say: Say, lost: list[tuple[int, float, float]]) -> None:
    axes = figure.subplots()
    at = np.linspace(2, _COUNTS[-1], 200)
    axes.semilogx(at, (at - 2) / at, color=GREY, label="(N - 2) / N", base=2)
    counts, means, errors = zip(*lost, strict=True)
    axes.errorbar(
        counts,
        means,
        yerr=[5 * error for error in errors],
        fmt="o",
        color=BLUE,
        markersize=4,
        capsize=3,
        label=say(Text("measured", "实测")),
    )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(say(Text("samples N", "样本数 N")))
    axes.set_ylabel(say(Text("part of the gradient that is left", "梯度保留的比例")))
    axes.legend(loc="lower right")


STUDY = Study(
    "batch-norm",
    Text("What does batch norm compute, and when?", "批归一化在何时计算什么？"),
    Text(
        "Training uses the statistics of the batch and collects moving averages; evaluation uses these. How long do "
        "they take, what is the gradient, and why is one sample too few?",
        "训练使用批次统计量并累积滑动平均；推理使用滑动平均。它们多久才可靠，梯度由什么组成，为什么一个样本太少？",
    ),
    _CLAIMS,
    {"approach": _approach, "gradients": _gradients, "statistics": _statistics},
    _conclude,
)
