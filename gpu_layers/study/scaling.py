"""Study: what the factor 1 / (1 - p) is for, and whether a small network notices it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.layers import Dropout
from gpu_layers.random import Generator
from gpu_layers.study import moons
from gpu_layers.study.claims import Cell, Claim, Criterion, Findings, Results, Study, Table, Text
from gpu_layers.study.figures import BLUE, GREEN, GREY, ORANGE, RED, Canvas, Say, draw
from gpu_layers.study.lab import Lab, on_cpu
from gpu_layers.study.texts import FIVE_ERRORS, ROUNDING
from gpu_layers.training.optimizers import SGD

_P = 0.2
_NEURONS = (1.0, 2.0, 3.0)
_SUMMED = 1000
_STEPS, _QUICK_STEPS = 30_000, 1_000
_SEEDS, _QUICK_SEEDS = 10, 2
_TRAJECTORY_STEPS = 200
#: Steps of training whose cost is in the table, as in the notes.
_MILESTONES = (0, 10_000, 20_000)

_CLAIMS = (
    Claim(
        "expectation",
        Text(
            "With the factor 1/(1-p) the expected output of a dropped-out neuron is the neuron itself.",
            "保留下来的神经元乘以 1/(1-p) 后，随机失活输出的期望等于原来的值。",
        ),
        r"E[D(h)] = (1-p)\cdot\frac{h}{1-p} + p\cdot 0 = h",
        Text(
            "distance of the mean from h, in standard errors, largest of three neurons",
            "均值与 h 之差（以标准误差为单位，取三个神经元中的最大值）",
        ),
        Criterion("<=", 5, FIVE_ERRORS),
        "h = np.array([1.0, 2.0, 3.0])\ny = gl.Dropout(0.2)(np.tile(h, (100_000, 1)))\nprint(y.mean(axis=0).round(2))",
    ),
    Claim(
        "expectation-unscaled",
        Text("Without the factor it is (1-p) h.", "不乘这个系数时，期望是 (1-p) h。"),
        r"E[m\,h] = (1-p)\,h,\qquad m\in\{0,1\},\ P(m=1)=1-p",
        Text(
            "distance of the mean from (1-p) h, in standard errors, largest of three neurons",
            "均值与 (1-p) h 之差（以标准误差为单位，取三个神经元中的最大值）",
        ),
        Criterion("<=", 5, FIVE_ERRORS),
        "h = np.array([1.0, 2.0, 3.0])\n"
        'y = gl.Dropout(0.2, scaling="inference")(np.tile(h, (100_000, 1)))\n'
        "print(y.mean(axis=0).round(2))",
    ),
    Claim(
        "patterns",
        Text(
            "Three neurons have eight masks; each is drawn as often as the product of its probabilities says.",
            "三个神经元共有八种掩码，每种出现的频率等于各自概率的乘积。",
        ),
        r"P(m_1,m_2,m_3) = \prod_{i=1}^{3} (1-p)^{m_i}\,p^{1-m_i}",
        Text(
            "distance of a frequency from its probability, in standard errors, largest of eight",
            "频率与概率之差（以标准误差为单位，取八种中的最大值）",
        ),
        Criterion("<=", 5, FIVE_ERRORS),
        "kept = gl.Dropout(0.2)(np.ones((100_000, 3))) > 0\n"
        "patterns, counts = np.unique(kept, axis=0, return_counts=True)\n"
        "for pattern, count in zip(patterns.astype(int), counts):\n"
        "    print(pattern, count / 100_000)",
    ),
    Claim(
        "sum",
        Text(
            "The sum over a layer keeps its mean, and its variance is p/(1-p) times the sum of squares.",
            "对整层求和，均值不变，方差等于 p/(1-p) 乘以平方和。",
        ),
        r"\mathrm{Var}\left[\sum_i D(h_i)\right] = \frac{p}{1-p}\sum_i h_i^2",
        Text(
            "distance of mean and variance from the formula, in standard errors, the larger",
            "均值和方差与公式之差（以标准误差为单位，取较大者）",
        ),
        Criterion("<=", 5, FIVE_ERRORS),
        "h = np.abs(np.random.default_rng(0).standard_normal(1000))\n"
        "sums = gl.Dropout(0.2)(np.tile(h, (4000, 1))).sum(axis=1)\n"
        "print(sums.mean() / h.sum(), sums.var() / (0.25 * (h**2).sum()))",
    ),
    Claim(
        "same-function",
        Text(
            "Scaling is a change of coordinates: divide the weights after each dropout by 1-p, leave the factor away, "
            "and training and evaluation compute the same numbers.",
            "缩放只是换了一套坐标：把每个随机失活层之后的权重除以 1-p 并去掉缩放系数，训练和推理算出的数值不变。",
        ),
        r"W\left(\frac{m\odot h}{1-p}\right) = \frac{W}{1-p}\,(m\odot h)",
        Text(
            "largest relative difference of the logits, training and evaluation, float64",
            "训练与推理时 logit 的最大相对差（float64）",
        ),
        Criterion("<=", 1e-12, ROUNDING),
        "h, w = np.arange(1.0, 9.0), np.linspace(-1.0, 2.0, 8)\n"
        "scaled = gl.Dropout(0.5, generator=gl.Generator(7))\n"
        'unscaled = gl.Dropout(0.5, scaling="inference", generator=gl.Generator(7))\n'
        "print(scaled(h) @ w, unscaled(h) @ (w / 0.5))\n"
        "print(scaled.eval()(h) @ w, unscaled.eval()(h) @ (w / 0.5))",
    ),
    Claim(
        "same-trajectory",
        Text(
            "So leaving the factor away is training with the rate of these weights times (1-p)², from weights times "
            "1-p: both runs pass through the same networks.",
            "因此，去掉缩放系数等价于：让这些权重的学习率乘以 (1-p)²，初始值乘以 1-p。两次训练经过完全相同的网络。",
        ),
        r"V=\frac{W}{1-p}:\quad V \leftarrow V-\eta\frac{\partial L}{\partial V}"
        r"\ \Leftrightarrow\ W \leftarrow W-(1-p)^2\,\eta\,\frac{\partial L}{\partial W}",
        Text(
            "largest difference of a weight after 200 steps, relative to the largest weight, float64",
            "训练 200 步后权重的最大差值（相对于最大权重，float64）",
        ),
        Criterion(
            "<=",
            1e-10,
            Text(
                "rounding errors of 1e-16 a step, which 200 steps of training may magnify",
                "每步约 1e-16 的舍入误差，经 200 步训练可能被放大",
            ),
        ),
        "from gpu_layers.study import Lab, scaling\n\nprint(scaling.trajectory_difference(Lab(), steps=20))",
    ),
    Claim(
        "same-accuracy",
        Text(
            "Often said: on a shallow network, scaled and unscaled reach the same test accuracy.",
            "常见说法：在浅层网络上，缩放与不缩放的测试准确率相同。",
        ),
        r"\left|\,\overline{a_{\mathrm{scaled}}-a_{\mathrm{unscaled}}}\,\right| \leq 1\,\%",
        Text(
            "mean difference of test accuracy, percentage points, same data and weights in each pair",
            "测试准确率的平均差（百分点；每一对的数据和初始权重相同）",
        ),
        Criterion("<=", 1, Text("two of 200 test points", "即 200 个测试点中的两个")),
        "from gpu_layers.study import Lab, moons\n\n"
        'for scaling in ("inverted", "inference"):\n'
        "    run = moons.train(Lab(), scaling, seeds=2, steps=100)\n"
        '    print(scaling, run.accuracy["as is"]["test"])',
        is_question=True,
    ),
    Claim(
        "lower-cost",
        Text(
            "Often said: unscaled ends with a slightly lower training cost.",
            "常见说法：不缩放时，训练代价最后略低一些。",
        ),
        r"J_{\mathrm{unscaled}} < J_{\mathrm{scaled}}",
        Text(
            "part of the seeds where it is lower, mean cost over the last tenth of the steps",
            "代价更低的随机种子所占比例（取最后十分之一步数的平均代价）",
        ),
        Criterion(">=", 0.9, Text("nine of ten by chance alone: 1.1 %", "若全凭偶然，十个中至少九个的概率为 1.1 %")),
        "from gpu_layers.study import Lab, moons\n\n"
        'for scaling in ("inverted", "inference"):\n'
        "    run = moons.train(Lab(), scaling, seeds=2, steps=100)\n"
        "    print(scaling, run.late_cost)",
        is_question=True,
    ),
    Claim(
        "generalises",
        Text("Often said: dropout improves the test accuracy.", "常见说法：随机失活能提高测试准确率。"),
        r"\overline{a_{\mathrm{dropout}}-a_{\mathrm{none}}} \geq 0.5\,\%",
        Text(
            "mean difference of test accuracy, scaled dropout against none, percentage points",
            "测试准确率的平均差（有缩放的随机失活减去不使用随机失活，百分点）",
        ),
        Criterion(">=", 0.5, Text("one of 200 test points", "即 200 个测试点中的一个")),
        "from gpu_layers.study import Lab, moons\n\n"
        'for scaling in ("inverted", None):\n'
        "    run = moons.train(Lab(), scaling, seeds=2, steps=100)\n"
        '    print(scaling, run.accuracy["as is"]["train"], run.accuracy["as is"]["test"])',
        is_question=True,
    ),
)

#: Name, colour and run of each arm, and the way of inference.
_ARMS = (
    (Text("scaled", "缩放"), BLUE, "inverted", "as is"),
    (Text("unscaled", "不缩放"), ORANGE, "inference", "as is"),
    (Text("unscaled, inference scaled", "训练不缩放、推理缩放"), GREEN, "inference", "corrected"),
    (Text("no dropout", "无随机失活"), GREY, "none", "as is"),
)


def _by_hand(lab: Lab) -> Results:
    """Three neurons, a sum of a thousand, and the change of coordinates."""
    draws, q = lab.choose(200_000, 40_000), 1 - _P
    h = np.array(_NEURONS)
    tiled = lab.place(np.tile(h, (draws, 1)))
    outputs = {
        scaling: on_cpu(Dropout(_P, scaling=scaling, generator=Generator(11))(tiled))
        for scaling in ("inverted", "inference")
    }
    measured = {
        "expectation": float(np.max(np.abs(outputs["inverted"].mean(axis=0) - h) / (h * np.sqrt(_P / q / draws)))),
        "expectation-unscaled": float(
            np.max(np.abs(outputs["inference"].mean(axis=0) - q * h) / (h * np.sqrt(_P * q / draws)))
        ),
    }
    kept = outputs["inverted"] > 0
    rows: list[list[Cell]] = []
    deviations = []
    for pattern in product((1, 0), repeat=len(h)):
        probability = float(np.prod([q if keep else _P for keep in pattern]))
        chosen = (kept == np.array(pattern, bool)).all(axis=1)
        deviations.append(abs(chosen.mean() - probability) / np.sqrt(probability * (1 - probability) / draws))
        seen = [np.unique(outputs[scaling][chosen], axis=0) for scaling in ("inverted", "inference")]
        # More than one output for one mask, or none, cannot pass for a row of the table.
        texts = [" ".join(f"{value:g}" for value in one[0]) if len(one) == 1 else "?" for one in seen]
        rows.append([" ".join(map(str, pattern)), f"{probability:.3f}", f"{chosen.mean():.4f}", *texts])
    measured["patterns"] = float(np.max(deviations))
    sums = _sums(lab)
    squares, count = float(np.sum(sums["h"] ** 2)), sums["inverted"].size
    variance = _P / q * squares
    measured["sum"] = max(
        abs(float(sums["inverted"].mean()) - float(sums["h"].sum())) / np.sqrt(variance / count),
        abs(float(sums["inverted"].var(ddof=1)) / variance - 1) / np.sqrt(2 / (count - 1)),
    )
    measured["same-function"] = _function_difference(lab)
    measured["same-trajectory"] = trajectory_difference(lab, _TRAJECTORY_STEPS)
    means = {scaling: " ".join(f"{value:.3f}" for value in y.mean(axis=0)) for scaling, y in outputs.items()}
    rows.append([Text("mean of all draws", "全部抽样的均值"), "1.000", "1.0000", means["inverted"], means["inference"]])
    return {"measured": measured, "rows": rows, "sums": sums}


def _sums(lab: Lab) -> dict[str, np.ndarray]:
    """Sums over a layer of positive activations, for many masks."""
    h = np.abs(np.random.default_rng(3).standard_normal(_SUMMED))
    tiled = lab.place(np.tile(h, (lab.choose(8000, 2000), 1)))
    return {
        "h": h,
        **{
            scaling: on_cpu(Dropout(_P, scaling=scaling, generator=Generator(12))(tiled)).sum(axis=1)
            for scaling in ("inverted", "inference")
        },
    }


def _in_other_coordinates(lab: Lab) -> tuple[Array, Array]:
    """An inverted network, and the unscaled one that computes the same."""
    scaled, unscaled = (moons.network(2, scaling, dtype=np.float64) for scaling in ("inverted", "inference"))
    state = scaled.state_dict()
    for name in _AFTER_DROPOUT:
        state[name] = state[name] / (1 - moons.DROP)
    unscaled.load_state_dict(state)
    return scaled.to(lab.device), unscaled.to(lab.device)


#: Weights that take what a dropout layer gives: those of the second and the third Linear.
_AFTER_DROPOUT = ("3.weight", "6.weight")


def _function_difference(lab: Lab) -> float:
    scaled, unscaled = _in_other_coordinates(lab)
    x = lab.place(moons.moons(2).x_train.astype(np.float64))
    largest = 0.0
    for mode in (True, False):
        a, b = (on_cpu(network.train(mode)(x)) for network in (scaled, unscaled))
        largest = max(largest, float(np.abs(a - b).max() / np.abs(a).max()))
    return largest


def trajectory_difference(lab: Lab, steps: int) -> float:
    """Train a scaled network, and the same unscaled in its own coordinates and rates, and compare the weights.

    Parameters
    ----------
    lab : Lab
    steps : int

    Returns
    -------
    float
        Largest difference, relative to the largest weight.
    """
    scaled, unscaled = _in_other_coordinates(lab)
    data, q = moons.moons(2), 1 - moons.DROP
    x, y = (lab.place(array.astype(np.float64)) for array in (data.x_train, data.y_train))
    after = {name: value for name, value in scaled.parameters.items() if name in _AFTER_DROPOUT}
    others = {name: value for name, value in scaled.parameters.items() if name not in _AFTER_DROPOUT}
    optimizers = (
        (scaled, SGD(after, q**2 * moons.LR)),
        (scaled, SGD(others, moons.LR)),
        (unscaled, SGD(unscaled.parameters, moons.LR)),
    )
    for _ in range(steps):
        for network in (scaled, unscaled):
            network.backward(moons.gradient_of_cost(network(x), y))
        for network, optimizer in optimizers:
            optimizer.step({name: network.gradients[name] for name in optimizer.parameters})
    largest = 0.0
    for name, value in unscaled.parameters.items():
        factor = q if name in _AFTER_DROPOUT else 1.0
        one, other = on_cpu(scaled.parameters[name]), factor * on_cpu(value)
        largest = max(largest, float(np.abs(one - other).max() / np.abs(one).max()))
    return largest


def _train_scaled(lab: Lab) -> moons.Trained:
    return _train(lab, "inverted")


def _train_unscaled(lab: Lab) -> moons.Trained:
    return _train(lab, "inference")


def _train_without(lab: Lab) -> moons.Trained:
    return _train(lab, None)


def _train(lab: Lab, scaling: str | None) -> moons.Trained:
    return moons.train(lab, scaling, seeds=lab.choose(_SEEDS, _QUICK_SEEDS), steps=lab.choose(_STEPS, _QUICK_STEPS))


def _conclude(parts: Results) -> Findings:
    by_hand = parts["by hand"]
    runs = {name: parts[name] for name in ("inverted", "inference", "none")}

    def test(arm: str, way: str = "as is") -> np.ndarray:
        return runs[arm].accuracy[way]["test"]

    measured = {
        **by_hand["measured"],
        "same-accuracy": 100 * abs(float((test("inverted") - test("inference")).mean())),
        "lower-cost": float((runs["inference"].late_cost < runs["inverted"].late_cost).mean()),
        "generalises": 100 * float((test("inverted") - test("none")).mean()),
    }
    return Findings(
        measured,
        tables=(_pattern_table(by_hand["rows"]), _training_table(runs)),
        figures=(_sums_figure(by_hand["sums"]), _cost_figure(runs), _boundary_figure(runs), _accuracy_figure(runs)),
    )


def _pattern_table(rows: list[list[Cell]]) -> Table:
    return Table(
        Text(
            f"Three neurons h = (1, 2, 3), p = {_P}: every mask, by hand and from the layer",
            f"三个神经元 h = (1, 2, 3)，p = {_P}：手算的全部掩码与层的实际输出",
        ),
        (
            Text("mask", "掩码"),
            Text("probability", "概率"),
            Text("frequency", "频率"),
            Text("scaled", "缩放"),
            Text("unscaled", "不缩放"),
        ),
        rows,
    )


def _training_table(runs: Mapping[str, moons.Trained]) -> Table:
    steps = (len(runs["none"].costs) - 1) * moons.RECORD_EVERY
    milestones = [step for step in _MILESTONES if step < steps]
    rows = []
    for name, _, run, way in _ARMS:
        costs = runs[run].costs
        row: list[Cell] = [name]
        row += [_mean_and_spread(costs[step // moons.RECORD_EVERY], 4) for step in milestones]
        row.append(_mean_and_spread(runs[run].late_cost, 4))
        row += [_mean_and_spread(100 * runs[run].accuracy[way][part], 1) for part in ("train", "test")]
        rows.append(row)
    seeds = runs["none"].costs.shape[1]
    return Table(
        Text(
            f"2-20-3-1, keep 0.86, learning rate 0.3, full batch, {steps:,} steps: mean ± standard deviation over "
            f"{seeds} seeds",
            f"2-20-3-1 网络，保留概率 0.86，学习率 0.3，全批量，{steps:,} 步：{seeds} 个随机种子的均值 ± 标准差",
        ),
        (
            Text("training", "训练方式"),
            *(Text(f"cost at step {step:,}", f"第 {step:,} 步的代价") for step in milestones),
            Text("cost, last tenth", "最后十分之一步的代价"),
            Text("train accuracy, %", "训练准确率（%）"),
            Text("test accuracy, %", "测试准确率（%）"),
        ),
        rows,
    )


def _mean_and_spread(values: np.ndarray, digits: int) -> str:
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


@draw(
    "sums",
    Text(
        f"The sum of a layer over many masks (bars) and the normal distribution of the formula's mean and variance "
        f"(lines), p = {_P}. Only the scaled sum has the mean of the layer without dropout.",
        f"一层神经元之和在大量掩码下的分布（柱）与按公式的均值和方差画出的正态分布（线），p = {_P}。"
        "只有缩放后，均值才与没有随机失活时一致。",
    ),
    size=(5.4, 2.9),
)
def _sums_figure(figure: Canvas, say: Say, sums: Mapping[str, np.ndarray]) -> None:
    q, total, squares = 1 - _P, float(sums["h"].sum()), float(np.sum(sums["h"] ** 2))
    axes = figure.subplots()
    for scaling, name, colour, mean, deviation in (
        ("inference", Text("unscaled", "不缩放"), ORANGE, q * total, np.sqrt(_P * q * squares)),
        ("inverted", Text("scaled", "缩放"), BLUE, total, np.sqrt(_P / q * squares)),
    ):
        axes.hist(sums[scaling], bins=40, density=True, color=colour, alpha=0.45, label=say(name))
        at = np.linspace(mean - 4 * deviation, mean + 4 * deviation, 100)
        density = np.exp(-0.5 * ((at - mean) / deviation) ** 2) / (deviation * np.sqrt(2 * np.pi))
        axes.plot(at, density, color=colour, linewidth=1.6)
    axes.axvline(total, color=GREY, linestyle="--", linewidth=1.2, label=say(Text("without dropout", "无随机失活")))
    axes.set_xlabel(say(Text("sum over 1,000 neurons", "1000 个神经元之和")))
    axes.set_ylabel(say(Text("density", "概率密度")))
    axes.set_ylim(top=axes.get_ylim()[1] * 1.25)
    axes.legend(loc="upper left", ncols=3)


@draw(
    "costs",
    Text(
        "Training cost, masks included: mean and standard deviation over the seeds.",
        "训练代价（含掩码）：各随机种子的均值与标准差。",
    ),
)
def _cost_figure(figure: Canvas, say: Say, runs: Mapping[str, moons.Trained]) -> None:
    axes = figure.subplots()
    for name, colour, run, way in _ARMS:
        if way == "corrected":
            continue  # the same training
        costs = runs[run].costs
        at = np.arange(len(costs)) * moons.RECORD_EVERY
        # Masks make single costs jump: a mean of ten records is drawn.
        width = min(10, len(costs))
        kernel = np.ones(width) / width
        smooth = np.stack([np.convolve(one, kernel, "valid") for one in costs.T])
        at = at[width - 1 :]
        mean, spread = smooth.mean(axis=0), smooth.std(axis=0, ddof=1)
        thin = slice(None, None, max(1, len(at) // 100))
        axes.plot(at[thin], mean[thin], color=colour, label=say(name), linewidth=1.6)
        axes.fill_between(at[thin], (mean - spread)[thin], (mean + spread)[thin], color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel(say(Text("step", "步数")))
    axes.set_ylabel(say(Text("training cost", "训练代价")))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(loc="upper right")


@draw(
    "boundaries",
    Text("Decision boundaries of the first seed, with its test points.", "第一个随机种子的决策边界及其测试点。"),
    size=(5.4, 4.9),
)
def _boundary_figure(figure: Canvas, say: Say, runs: Mapping[str, moons.Trained]) -> None:
    data = moons.moons(1)
    for axes, (name, colour, run, way) in zip(figure.subplots(2, 2).flat, _ARMS, strict=True):
        left, right, bottom, top = moons.PLANE
        axes.imshow(
            runs[run].plane[way],
            origin="lower",
            extent=moons.PLANE,
            cmap="RdBu",
            vmin=-1.0,
            vmax=2.0,
            aspect="auto",
            interpolation="none",
        )
        grid = [np.linspace(*ends, runs[run].plane[way].shape[0]) for ends in ((left, right), (bottom, top))]
        axes.contour(*grid, runs[run].plane[way], levels=[0.5], colors="black", linewidths=1.3)
        for label, mark in ((0, RED), (1, BLUE)):
            chosen = data.x_test[0][data.y_test[0, :, 0] == label]
            axes.plot(*chosen.T, ".", color=mark, markersize=3.2, alpha=0.8, rasterized=True)
        accuracy = 100 * runs[run].accuracy[way]["test"][0]
        axes.set_title(f"{say(name)}\n{say(Text('test', '测试'))} {accuracy:.1f} %", color=colour)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(False)


@draw(
    "accuracy",
    Text(
        "Accuracy in evaluation: mean and standard deviation over the seeds.",
        "推理时的准确率：各随机种子的均值与标准差。",
    ),
    size=(5.4, 3.0),
)
def _accuracy_figure(figure: Canvas, say: Say, runs: Mapping[str, moons.Trained]) -> None:
    axes = figure.subplots()
    for row, (_, colour, run, way) in enumerate(_ARMS):
        for part, shift, filled in (("train", -0.15, False), ("test", 0.15, True)):
            values = 100 * runs[run].accuracy[way][part]
            axes.errorbar(
                values.mean(),
                row + shift,
                xerr=values.std(ddof=1),
                fmt="o" if filled else "s",
                markerfacecolor=colour if filled else "white",
                color=colour,
                capsize=3,
            )
            axes.annotate(
                f"{values.mean():.1f}",
                (values.mean(), row + shift),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
                color=colour,
            )
    axes.set_yticks(range(len(_ARMS)), [say(name) for name, *_ in _ARMS])
    axes.invert_yaxis()
    axes.set_xlabel(say(Text("accuracy, %: □ training points, ● test points", "准确率（%）：□ 训练点，● 测试点")))


STUDY = Study(
    "scaling",
    Text("Why divide by 1-p?", "为什么要除以 1-p？"),
    Text(
        "Inverted dropout divides what it keeps by 1-p, so that a layer's expectation stays what it is without "
        "dropout. A small network is then trained with and without that factor.",
        "反向随机失活（inverted dropout）把保留下来的值除以 1-p，使一层的期望与没有随机失活时相同。"
        "随后用一个小网络比较有无这个系数时的训练。",
    ),
    _CLAIMS,
    {"inverted": _train_scaled, "inference": _train_unscaled, "none": _train_without, "by hand": _by_hand},
    _conclude,
)
