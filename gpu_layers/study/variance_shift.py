"""Study: dropout before batch norm, and the variance that training promises and evaluation does not keep.

Theory: Li, Chen, Hu, Yang, "Understanding the Disharmony between Dropout and Batch Normalization by Variance Shift",
2018 (CVPR 2019).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

import gpu_layers as gl
from gpu_layers.core.array import Array
from gpu_layers.layers import BatchNorm1d, Dropout, Layer, ReLU
from gpu_layers.layers.linear import Linear
from gpu_layers.layers.sequential import Sequential
from gpu_layers.random import Generator
from gpu_layers.study.claims import Cell, Claim, Criterion, Findings, Results, Study, Table, Text
from gpu_layers.study.figures import COLOURS, GREEN, GREY, ORANGE, Canvas, Say, draw
from gpu_layers.study.lab import Lab, on_cpu
from gpu_layers.study.networks import flat, loss_and_accuracy, train_classifier
from gpu_layers.study.texts import FIVE_ERRORS
from gpu_layers.training.dataset import Dataset, digits

_CHAIN_P, _DEPTHS = (0.1, 0.3, 0.5), 4
_WIDE_P, _WIDTHS = (0.3, 0.5, 0.7), (4, 16, 64, 256)
_CORRELATION = 0.1
_TRAINED_P = (0.2, 0.5)
_PLACES = ("none", "before", "after")
_UNITS = 128
# Large: with few samples a batch's own spread would be seen beside the theory, which knows of none.
_BATCH = 2048

_CLAIMS = (
    Claim(
        "first",
        Text(
            "Dropout right before batch norm: the variance that evaluation meets is a known part of the moving "
            "variance that training collected.",
            "随机失活紧接批归一化时，推理遇到的方差与训练累积的滑动方差之比是确定的。",
        ),
        r"\Delta = \frac{\mathrm{Var}_{\mathrm{eval}}}{\mathrm{Var}_{\mathrm{moving}}}"
        r" = \frac{v}{\frac{1}{1-p}(c^2+v)-c^2},\qquad c=E[x],\ v=\mathrm{Var}[x]",
        Text(
            "distance from the theory, in standard errors, largest of three p",
            "与理论值之差（以标准误差为单位，取三个 p 中的最大值）",
        ),
        Criterion("<=", 5, FIVE_ERRORS),
        "x = np.random.default_rng(0).standard_normal((100_000, 1))\n"
        'dropout, bn = gl.Dropout(0.5), gl.BatchNorm1d(1, momentum=None, dtype="float64")\n'
        "bn(dropout(x))\n"
        'print(x.var() / bn.buffers["running_var"])',
    ),
    Claim(
        "depth",
        Text("Every further pair multiplies the ratio by 1-p.", "每增加一对随机失活与批归一化，这个比值就再乘以 1-p。"),
        r"\Delta_k = \Delta_1\,(1-p)^{k-1}",
        Text(
            "distance from the theory, in standard errors, three p, depths 2 to 4",
            "与理论值之差（以标准误差为单位，三个 p，深度 2 至 4）",
        ),
        Criterion("<=", 5, FIVE_ERRORS),
        "x, ratio = np.random.default_rng(0).standard_normal((100_000, 1)), 1.0\n"
        "for depth in range(3):\n"
        '    bn = gl.BatchNorm1d(1, momentum=None, dtype="float64")\n'
        "    x = bn(gl.Dropout(0.5)(x))\n"
        '    print(ratio := ratio / bn.buffers["running_var"])',
    ),
    Claim(
        "width",
        Text(
            "With a linear layer in between, correlated inputs and weights of one sign soften the shift: the wider, "
            "the milder.",
            "中间隔一个线性层时，输入相关且权重同号会减轻偏移：层越宽，偏移越小。",
        ),
        r"\Delta = \frac{v+\rho v(d\cos^2\theta-1)}{\frac{1}{1-p}(c^2+v)-c^2+\rho v(d\cos^2\theta-1)},"
        r"\qquad \cos^2\theta = \frac{(\sum w_i)^2}{d\sum w_i^2}",
        Text(
            "largest relative difference from the theory, three p, four widths",
            "与理论值的最大相对差（三个 p、四种宽度）",
        ),
        Criterion(
            "<=",
            0.05,
            Text(
                "the theory takes one c, v and rho for all inputs; those of the sample differ a little",
                "理论假定所有输入的 c、v、ρ 相同，而样本中的各输入略有差异",
            ),
        ),
        "rng = np.random.default_rng(0)\n"
        "for d in (4, 256):\n"
        "    x = 1 + 0.3 * rng.standard_normal((20_000, 1)) + 0.95 * rng.standard_normal((20_000, d))\n"
        "    z, noisy = x.mean(axis=1), gl.Dropout(0.5)(x).mean(axis=1)\n"
        "    print(d, z.var() / noisy.var())",
    ),
    Claim(
        "trained",
        Text(
            "In a trained network too: the moving variance is that without dropout plus the noise of the masks.",
            "训练好的网络也是如此：滑动方差等于无随机失活时的方差加上掩码带来的噪声。",
        ),
        r"\mathrm{Var}_{\mathrm{moving}} = \mathrm{Var}_{\mathrm{clean}} + \frac{p}{1-p}\sum_i w_i^2\,E[a_i^2]",
        Text(
            "largest relative difference over the units' mean, second batch norm",
            "第二个批归一化层各单元平均的最大相对差",
        ),
        Criterion(
            "<=", 0.03, Text("the moving variance averages a finite number of masks", "滑动方差只平均了有限个掩码")
        ),
        "a = np.abs(np.random.default_rng(0).standard_normal((50_000, 32)))\n"
        "w = np.random.default_rng(1).standard_normal(32)\n"
        "noisy = (gl.Dropout(0.5)(a) @ w).var()\n"
        "print(noisy, (a @ w).var() + (w**2 * (a**2).mean(axis=0)).sum())",
    ),
    Claim(
        "repaired",
        Text(
            "Recalibration estimates the statistics again, without dropout, and the shift is gone.",
            "重新校准在关闭随机失活的情况下重新估计统计量，偏移随之消失。",
        ),
        r"\Delta \rightarrow 1",
        Text(
            "|ratio - 1| after recalibration, largest over networks and layers",
            "重新校准后的 |比值 - 1|（取各网络、各层的最大值）",
        ),
        Criterion("<=", 0.01, Text("N/(N-1), and rounding in float32", "N/(N-1) 与 float32 的舍入误差")),
        "from gpu_layers.training import Sequential\n\n"
        "x = np.random.default_rng(0).standard_normal((4096, 8)).astype(np.float32)\n"
        "model = Sequential(gl.Dropout(0.5), gl.BatchNorm1d(8))\n"
        "gl.recalibrate(model, [x])\n"
        'print(x.var(axis=0).mean() / model.buffers["1.running_var"].mean())',
    ),
    Claim(
        "after-last",
        Text(
            "Often said: dropout does less harm after the last batch norm than before it.",
            "常见说法：随机失活放在最后一个批归一化之后，比放在之前危害更小。",
        ),
        r"\overline{L_{\mathrm{before}} - L_{\mathrm{after}}} \geq 0.01",
        Text("mean difference of test loss, p = 0.5, no recalibration", "测试损失的平均差（p = 0.5，未重新校准）"),
        Criterion(">=", 0.01, Text("a tenth of the loss of such a network", "约为此类网络损失的十分之一")),
        "x = np.random.default_rng(0).standard_normal((100_000, 1))\n"
        "for p in (0.5, 0.0):  # without dropout before it, batch norm gives 1\n"
        '    bn = gl.BatchNorm1d(1, momentum=None, dtype="float64")\n'
        "    bn(gl.Dropout(p)(x))\n"
        "    print(p, bn.eval()(x).std())",
        is_question=True,
    ),
    Claim(
        "repair-helps",
        Text(
            "Often said: recalibration repairs the accuracy of a network with dropout before batch norm.",
            "常见说法：对在批归一化之前使用随机失活的网络，重新校准能恢复准确率。",
        ),
        r"\overline{L_{\mathrm{moving}} - L_{\mathrm{recalibrated}}} > 0",
        Text("part of the networks whose test loss falls, p = 0.5", "测试损失下降的网络所占比例（p = 0.5）"),
        Criterion(">=", 0.9, Text("by chance alone it would be half", "若全凭偶然，应为一半")),
        "x = np.random.default_rng(0).standard_normal((4096, 1)).astype(np.float32)\n"
        "bn = gl.BatchNorm1d(1, momentum=None)\n"
        "bn(gl.Dropout(0.5)(x))\n"
        "gl.recalibrate(bn, [x])\n"
        "print(bn.eval()(x).std())",
        is_question=True,
    ),
)


def first_ratio(p: float, c: float, v: float) -> float:
    """The paper's case (a): dropout, then batch norm."""
    return v / ((c**2 + v) / (1 - p) - c**2)


def wide_ratio(p: float, c: float, v: float, rho: float, d: int, cos_squared: float) -> float:
    """The paper's case (b): dropout, a linear layer of d inputs, then batch norm."""
    common = rho * v * (d * cos_squared - 1)
    return (v + common) / ((c**2 + v) / (1 - p) - c**2 + common)


def _in_batches(x: Array) -> Iterator[Array]:
    for start in range(0, x.shape[0], _BATCH):
        yield x[start : start + _BATCH]


def _chains(lab: Lab) -> list[Results]:
    """Dropout and batch norm in turn: the ratio at each depth."""
    features, rows = 16, []
    count = _BATCH * lab.choose(15, 3)
    x = 1 + np.random.default_rng(1).standard_normal((count, features))
    c, v = float(x.mean()), float(x.var(axis=0).mean())
    x = lab.place(x)
    for p in _CHAIN_P:
        masks = Generator(51).spawn(_DEPTHS)
        norms = [BatchNorm1d(features, momentum=None, affine=False, eps=1e-12, dtype="float64") for _ in range(_DEPTHS)]
        chain: list[Layer] = []
        for mask, norm in zip(masks, norms, strict=True):
            chain += [Dropout(p, generator=mask), norm]
        model = Sequential(*chain)
        model.to(lab.device)
        for batch in _in_batches(x):
            model(batch)
        model.eval()
        y = x
        for depth in range(_DEPTHS):
            y = chain[2 * depth](y)
            met = float(on_cpu(y).var(axis=0).mean())
            ratio = met / float(on_cpu(norms[depth].buffers["running_var"]).mean())
            theory = first_ratio(p, c, v) * (1 - p) ** depth
            # Of a variance of n numbers, by their kurtosis: 3 of normal ones, and 1 / (1 - p) more by each dropout.
            error = theory * math.sqrt(3 / (1 - p) ** (depth + 1) / (count * features))
            rows.append({"p": p, "depth": depth + 1, "ratio": ratio, "theory": theory, "error": error})
            y = norms[depth](y)
    return rows


def _widths(lab: Lab) -> list[Results]:
    """Dropout, a linear layer, batch norm: the ratio for several widths."""
    rng, rows, count = np.random.default_rng(2), [], _BATCH * lab.choose(20, 10)
    for d in _WIDTHS:
        shared, own = rng.standard_normal((count, 1)), rng.standard_normal((count, d))
        x = 1 + math.sqrt(_CORRELATION) * shared + math.sqrt(1 - _CORRELATION) * own
        covariance = np.cov(x, rowvar=False)
        c, v = float(x.mean()), float(covariance.trace()) / d
        rho = float(covariance.sum() - covariance.trace()) / (d * (d - 1) * v)
        x = lab.place(x)
        linear = Linear(d, 16, bias=False, dtype="float64")
        weight = rng.uniform(0, 1, (16, d))
        linear.load_state_dict({"weight": weight})
        linear.to(lab.device)
        met = on_cpu(linear(x)).var(axis=0)
        cos_squared = weight.sum(axis=1) ** 2 / (d * (weight**2).sum(axis=1))
        for p in _WIDE_P:
            norm = BatchNorm1d(16, momentum=None, dtype="float64").to(lab.device)
            dropout = Dropout(p, generator=Generator(52))
            for _ in range(2):  # twice, for less noise of the masks
                for batch in _in_batches(x):
                    norm(linear(dropout(batch)))
            ratio = float((met / on_cpu(norm.buffers["running_var"])).mean())
            theory = float(np.mean([wide_ratio(p, c, v, rho, d, one) for one in cos_squared]))
            rows.append({"p": p, "d": d, "ratio": ratio, "theory": theory})
    return rows


def _network(place: str, p: float, seed: int) -> Sequential:
    """Linear-BN-ReLU three times, then Linear; dropout in between (before later batch norms), or after the last."""
    weights, masks = np.random.default_rng(seed), Generator(seed).spawn(2)
    layers: list[Layer] = []
    for block, features in enumerate((64, _UNITS, _UNITS)):
        layers += [Linear(features, _UNITS, bias=False, seed=weights), BatchNorm1d(_UNITS), ReLU()]
        if place == "before" and block < 2:
            layers.append(Dropout(p, generator=masks[block]))
    if place == "after":
        layers.append(Dropout(p, generator=masks[0]))
    return Sequential(*layers, Linear(_UNITS, 10, seed=weights))


def _trained(lab: Lab) -> list[Results]:
    """Digits with dropout before and after the last batch norm: ratios, loss, accuracy, before and after repair."""
    data, seeds, rows = digits(), lab.choose(4, 1), []
    arms = [("none", 0.0), *((place, p) for p in _TRAINED_P for place in ("before", "after"))]
    for number, (place, p) in enumerate(arms):
        for seed in range(seeds):
            network = _network(place, p, seed)
            train_classifier(lab, network, data, epochs=lab.choose(15, 4), seed=seed)
            row: Results = {"place": place, "p": p, "seed": seed}
            row |= _looked_at(lab, network, data, "moving")
            if place == "before":
                row["noise"] = _noise_difference(lab, network, data, p)
            gl.recalibrate(network, [flat(lab, data.x_train)])
            row |= _looked_at(lab, network, data, "recalibrated")
            rows.append(row)
            lab.progress((number * seeds + seed + 1) / (len(arms) * seeds))
    return rows


def _looked_at(lab: Lab, network: Sequential, data: Dataset, state: str) -> Results:
    network.eval()
    loss, accuracy = loss_and_accuracy(network(flat(lab, data.x_test)), data.y_test)
    ratios, y = [], flat(lab, data.x_train)
    for layer in network.layers:
        if isinstance(layer, BatchNorm1d):
            met, moving = on_cpu(y).var(axis=0), on_cpu(layer.buffers["running_var"])
            ratios.append(float(met.mean() / moving.mean()))
        y = layer(y)
    return {f"{state} loss": loss, f"{state} accuracy": accuracy, f"{state} ratios": ratios}


def _noise_difference(lab: Lab, network: Sequential, data: Dataset, p: float) -> float:
    """Relative difference of the second batch norm's moving variance, collected anew, from that of the formula."""
    x = flat(lab, data.x_train)
    linear, norm, relu, dropout, second = network.layers[:5]
    first = BatchNorm1d(_UNITS).to(lab.device)
    first.load_state_dict(norm.state_dict())
    a = relu(first.train()(linear(x)))
    dropout.train()
    collected = BatchNorm1d(_UNITS, momentum=None).to(lab.device)
    for _ in range(lab.choose(40, 20)):
        collected(second(dropout(a)))
    dropout.eval()
    clean = on_cpu(second(a)).astype(np.float64).var(axis=0)
    weight = on_cpu(second.parameters["weight"]).astype(np.float64)
    noise = p / (1 - p) * (weight**2) @ (on_cpu(a).astype(np.float64) ** 2).mean(axis=0)
    moving = on_cpu(collected.buffers["running_var"]).mean()
    return abs(float(moving / (clean + noise).mean()) - 1)


def _conclude(parts: Results) -> Findings:
    chains, widths, rows = parts["chains"], parts["widths"], parts["trained"]
    before = [row for row in rows if row["place"] == "before" and row["p"] == max(_TRAINED_P)]
    after = [row for row in rows if row["place"] == "after" and row["p"] == max(_TRAINED_P)]
    off = [(row["depth"], abs(row["ratio"] - row["theory"]) / row["error"]) for row in chains]
    measured = {
        "first": max(distance for depth, distance in off if depth == 1),
        "depth": max(distance for depth, distance in off if depth > 1),
        "width": max(abs(row["ratio"] / row["theory"] - 1) for row in widths),
        "trained": max(row["noise"] for row in rows if "noise" in row),
        "repaired": max(abs(ratio - 1) for row in rows for ratio in row["recalibrated ratios"]),
        "after-last": float(np.mean([row["moving loss"] for row in before]))
        - float(np.mean([row["moving loss"] for row in after])),
        "repair-helps": float(np.mean([row["recalibrated loss"] < row["moving loss"] for row in before])),
    }
    return Findings(
        measured,
        tables=(_trained_table(rows), _chain_table(chains)),
        figures=(_chain_figure(chains), _width_figure(widths), _trained_figure(rows)),
    )


_PLACE_NAMES = {
    "none": Text("no dropout", "无随机失活"),
    "before": Text("before batch norms", "批归一化之前"),
    "after": Text("after the last batch norm", "最后一个批归一化之后"),
}


def _chain_table(rows: list[Results]) -> Table:
    return Table(
        Text(
            "Variance met in evaluation over moving variance, dropout and batch norm in turn, mean 1, variance 1",
            "推理方差与滑动方差之比（随机失活与批归一化交替，均值 1，方差 1）",
        ),
        (
            Text("p", "p"),
            *(Text(f"depth {depth}: theory, measured", f"深度 {depth}：理论，实测") for depth in range(1, _DEPTHS + 1)),
        ),
        [[f"{p:g}", *(f"{row['theory']:.4f}, {row['ratio']:.4f}" for row in rows if row["p"] == p)] for p in _CHAIN_P],
    )


def _trained_table(rows: list[Results]) -> Table:
    groups: dict[tuple[str, float], list[Results]] = {}
    for row in rows:
        groups.setdefault((row["place"], row["p"]), []).append(row)
    seeds = len(next(iter(groups.values())))
    lines: list[list[Cell]] = []
    for (place, p), group in groups.items():
        line: list[Cell] = [_PLACE_NAMES[place], f"{p:g}"]
        for state in ("moving", "recalibrated"):
            ratios = np.mean([row[f"{state} ratios"] for row in group], axis=0)
            line.append(" ".join(f"{ratio:.2f}" for ratio in ratios))
            line.append(f"{np.mean([row[f'{state} loss'] for row in group]):.4f}")
            line.append(f"{100 * np.mean([row[f'{state} accuracy'] for row in group]):.2f}")
        lines.append(line)
    return Table(
        Text(
            f"64-128-128-128-10 with batch norm on handwritten digits, mean of {seeds} seeds: ratio at each batch "
            "norm, test loss, test accuracy",
            f"手写数字上带批归一化的 64-128-128-128-10 网络，{seeds} 个随机种子的均值："
            "各批归一化层的比值、测试损失、测试准确率",
        ),
        (
            Text("dropout", "随机失活的位置"),
            Text("p", "p"),
            Text("ratios", "比值"),
            Text("loss", "损失"),
            Text("accuracy, %", "准确率（%）"),
            Text("ratios, recalibrated", "校准后的比值"),
            Text("loss", "损失"),
            Text("accuracy, %", "准确率（%）"),
        ),
        lines,
    )


@draw(
    "depth",
    Text(
        "The ratio at each depth: theory (lines) and measured (points, five standard errors).",
        "各深度上的比值：理论（线）与实测（点，误差线为五倍标准误差）。",
    ),
)
def _chain_figure(figure: Canvas, say: Say, rows: list[Results]) -> None:
    axes = figure.subplots()
    for p, colour in zip(_CHAIN_P, COLOURS, strict=False):
        chosen = [row for row in rows if row["p"] == p]
        depths = [row["depth"] for row in chosen]
        axes.semilogy(depths, [row["theory"] for row in chosen], "-", color=colour, label=f"p = {p:g}")
        axes.errorbar(
            depths,
            [row["ratio"] for row in chosen],
            yerr=[5 * row["error"] for row in chosen],
            fmt="o",
            color=colour,
            markersize=5,
            capsize=3,
        )
    axes.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axes.set_xticks(range(1, _DEPTHS + 1))
    axes.set_yticks([0.05, 0.1, 0.2, 0.5, 1])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xlabel(say(Text("pairs of dropout and batch norm", "随机失活与批归一化的对数")))
    axes.set_ylabel(say(Text("variance met / moving variance", "实际方差 / 滑动方差")))
    axes.legend()


@draw(
    "width",
    Text(
        f"A linear layer in between, inputs correlated by {_CORRELATION:g}: theory (lines) and measured (points).",
        f"中间有线性层，输入之间的相关系数为 {_CORRELATION:g}：理论（线）与实测（点）。",
    ),
    size=(5.4, 3.0),
)
def _width_figure(figure: Canvas, say: Say, rows: list[Results]) -> None:
    axes = figure.subplots()
    for p, colour in zip(_WIDE_P, COLOURS[1:], strict=False):
        chosen = [row for row in rows if row["p"] == p]
        axes.semilogx(
            [row["d"] for row in chosen],
            [row["theory"] for row in chosen],
            "-",
            color=colour,
            label=f"p = {p:g}",
            base=4,
        )
        axes.plot([row["d"] for row in chosen], [row["ratio"] for row in chosen], "o", color=colour, markersize=5)
    axes.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axes.set_ylim(0, 1.05)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(say(Text("inputs d of the linear layer", "线性层的输入数 d")))
    axes.set_ylabel(say(Text("variance met / moving variance", "实际方差 / 滑动方差")))
    axes.legend(loc="lower right")


@draw(
    "trained",
    Text(
        "Test loss of trained networks, by the place and the p of dropout, before and after recalibration; a point "
        "for each seed.",
        "训练好的网络的测试损失，按随机失活的位置与 p 排列，校准前后对比；每个点对应一个随机种子。",
    ),
    size=(5.4, 3.2),
)
def _trained_figure(figure: Canvas, say: Say, rows: list[Results]) -> None:
    axes = figure.subplots()
    arms = list(dict.fromkeys((row["place"], row["p"]) for row in rows))
    for state, shift, colour, name in (
        ("moving", -0.17, ORANGE, Text("moving averages", "滑动平均")),
        ("recalibrated", 0.17, GREEN, Text("recalibrated", "重新校准")),
    ):
        for position, (place, p) in enumerate(arms):
            losses = [row[f"{state} loss"] for row in rows if (row["place"], row["p"]) == (place, p)]
            label = say(name) if position == 0 else None
            axes.barh(position + shift, np.mean(losses), height=0.32, color=colour, alpha=0.5, label=label)
            axes.plot(losses, [position + shift] * len(losses), ".", color=colour, markersize=5)
    names = [say(_PLACE_NAMES[place]) + (f", {p:g}" if p else "") for place, p in arms]
    axes.set_yticks(range(len(arms)), names)
    axes.invert_yaxis()
    axes.set_xlabel(say(Text("test loss", "测试损失")))
    figure.legend(loc="outside lower right", ncols=2)


STUDY = Study(
    "variance-shift",
    Text("Dropout before batch norm: what shifts?", "批归一化之前的随机失活：什么在偏移？"),
    Text(
        "Dropout adds variance in training and none in evaluation; batch norm after it goes on dividing by the "
        "former. By how much is known in closed form.",
        "随机失活在训练时增加方差，推理时不增加；其后的批归一化却仍按训练时的方差归一化。偏差有多大，可由闭式给出。",
    ),
    _CLAIMS,
    {"trained": _trained, "chains": _chains, "widths": _widths},
    _conclude,
)
