"""Study: dropout after the activation, or before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from gpu_layers.layers import ActivationDropout, Layer
from gpu_layers.layers.linear import Linear
from gpu_layers.layers.sequential import Sequential
from gpu_layers.ops import dropout_mask
from gpu_layers.random import Generator
from gpu_layers.study.claims import Claim, Criterion, Findings, Results, Study, Table, Text, same
from gpu_layers.study.figures import BLUE, GREY, ORANGE, Canvas, Say, draw
from gpu_layers.study.lab import Lab, different_bits, on_cpu
from gpu_layers.study.networks import flat, loss_and_accuracy, train_classifier
from gpu_layers.study.texts import EXACT, FIVE_ERRORS, ROUNDING
from gpu_layers.training.dataset import digits

_P = 0.5
_ORDERS = ("after", "before")
_SHOWN = ("relu", "sigmoid", "tanh", "gelu")
_UNITS = 50
_SEED = 33


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _normal_cdf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda value: 0.5 * math.erfc(-value / math.sqrt(2)))(x)


#: The textbook's phi and its derivative, to compare the layers with.
_PHI: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]] = {
    "relu": (lambda x: np.maximum(x, 0), lambda x: (x > 0) * 1.0),
    "leaky_relu": (lambda x: np.where(x > 0, x, 0.01 * x), lambda x: np.where(x > 0, 1, 0.01)),
    "sigmoid": (_sigmoid, lambda x: _sigmoid(x) * (1 - _sigmoid(x))),
    "tanh": (np.tanh, lambda x: 1 - np.tanh(x) ** 2),
    "gelu": (lambda x: x * _normal_cdf(x), lambda x: _normal_cdf(x) + x * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)),
    "silu": (lambda x: x * _sigmoid(x), lambda x: _sigmoid(x) * (1 + x * (1 - _sigmoid(x)))),
    "identity": (lambda x: x * 1.0, np.ones_like),
}

_CLAIMS = (
    Claim(
        "forward",
        Text(
            "After the activation, dropout zeroes phi; before it, dropout zeroes the argument.",
            "放在激活函数之后，失活的是 φ 的输出；放在之前，失活的是 φ 的输入。",
        ),
        r"y_{\mathrm{after}} = \frac{m\,\varphi(x)}{1-p},\qquad"
        r" y_{\mathrm{before}} = \varphi\left(\frac{m\,x}{1-p}\right)",
        Text(
            "largest difference from the formula, seven activations, both orders, float64",
            "与公式的最大差值（七种激活函数、两种顺序，float64）",
        ),
        Criterion("<=", 1e-12, ROUNDING),
        "x = np.array([-1.0, 0.5, 2.0, 3.0])\n"
        'for order in ("after", "before"):\n'
        '    layer = gl.ActivationDropout("tanh", 0.5, order=order, generator=gl.Generator(4))\n'
        "    print(order, layer(x).round(4))",
    ),
    Claim(
        "gradient",
        Text(
            "The gradient of the weights follows: the slope is taken at x, or at the dropped and scaled x.",
            "权重的梯度随之而定：斜率取在 x 处，或取在失活并缩放后的 x 处。",
        ),
        r"\frac{\partial L}{\partial W} = \left(\frac{m}{1-p}\,\varphi'(x)\,\frac{\partial L}{\partial y}\right)^{T} h"
        r",\quad"
        r"\left(\frac{m}{1-p}\,\varphi'\left(\frac{m\,x}{1-p}\right)\frac{\partial L}{\partial y}\right)^{T} h",
        Text(
            "largest difference from the formula, relative to the largest gradient, float64",
            "与公式的最大差值（相对于最大梯度，float64）",
        ),
        Criterion("<=", 1e-12, ROUNDING),
        "x = np.array([0.5, 2.0])\n"
        'for order in ("after", "before"):\n'
        '    layer = gl.ActivationDropout("tanh", 0.5, order=order, generator=gl.Generator(4))\n'
        "    y = layer(x)\n"
        "    print(order, layer.backward(np.ones(2)))",
    ),
    Claim(
        "phi-of-zero",
        Text(
            "Before the activation a dropped unit is phi(0): for a sigmoid one half, not silent.",
            "放在激活函数之前时，被失活的单元输出 φ(0)：对 sigmoid 而言是二分之一，并未静默。",
        ),
        r"m = 0 \ \Rightarrow\ y_{\mathrm{before}} = \varphi(0),\qquad \sigma(0) = \frac{1}{2}",
        Text("largest difference of a dropped unit from phi(0)", "失活单元与 φ(0) 的最大差值"),
        Criterion("==", 0, EXACT),
        'layer = gl.ActivationDropout("sigmoid", 0.5, order="before")\nprint(layer(np.full(8, 3.0)).round(3))',
    ),
    Claim(
        "shift",
        Text(
            "So the next layer's expectation moves in training, by a formula; with dropout after the activation it "
            "does not.",
            "因此下一层的期望在训练时会发生偏移，且可由公式给出；放在激活函数之后则没有偏移。",
        ),
        r"E[z]-z_{\mathrm{eval}} = \sum_i w_i \left((1-p)\,\varphi\left(\frac{x_i}{1-p}\right)"
        r" + p\,\varphi(0) - \varphi(x_i)\right)",
        Text(
            "distance from the formula, in standard errors, largest of 14",
            "与公式之差（以标准误差为单位，取 14 个中的最大值）",
        ),
        Criterion("<=", 5, FIVE_ERRORS),
        "x = np.full((20_000, 10), 3.0)\n"
        'for order in ("after", "before"):\n'
        '    layer = gl.ActivationDropout("sigmoid", 0.5, order=order)\n'
        "    print(order, layer(x).sum(axis=1).mean(), layer.eval()(x[:1]).sum())",
    ),
    Claim(
        "variance",
        Text(
            "The noise differs too: before a saturating activation it is bounded.",
            "噪声也不同：放在会饱和的激活函数之前时，噪声有上界。",
        ),
        r"\mathrm{Var}_{\mathrm{after}} = \sum_i w_i^2\,\varphi(x_i)^2\,\frac{p}{1-p},\quad"
        r"\mathrm{Var}_{\mathrm{before}} = \sum_i w_i^2\,p(1-p)"
        r"\left(\varphi\left(\frac{x_i}{1-p}\right)-\varphi(0)\right)^2",
        Text(
            "distance of the variance from the formula, in standard errors, largest of 14",
            "方差与公式之差（以标准误差为单位，取 14 个中的最大值）",
        ),
        Criterion("<=", 5, FIVE_ERRORS),
        "x = np.full((20_000, 10), 3.0)\n"
        'for order in ("after", "before"):\n'
        '    layer = gl.ActivationDropout("tanh", 0.5, order=order)\n'
        "    print(order, layer(x).sum(axis=1).var())",
    ),
    Claim(
        "relu-either-way",
        Text(
            "For ReLU both orders give the same bits, forward and backward.",
            "对 ReLU 而言，两种顺序的前向与反向结果逐位相同。",
        ),
        r"\max\left(\frac{m\,x}{1-p},\,0\right) = \frac{m}{1-p}\,\max(x,\,0)",
        Text(
            "elements with a different bit, forward and backward, float16 to float64",
            "存在不同比特的元素个数（前向与反向，float16 至 float64）",
        ),
        Criterion("==", 0, EXACT),
        "x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)\n"
        "a, b = (gl.ActivationDropout('relu', 0.3, order=order, generator=gl.Generator(1))(x)\n"
        "        for order in ('after', 'before'))\n"
        "print(a.tobytes() == b.tobytes())",
    ),
    Claim(
        "relu-trains-the-same",
        Text(
            "So a ReLU network trains along the same curve, whichever order.",
            "因此 ReLU 网络无论哪种顺序，训练曲线都完全一致。",
        ),
        r"L_{\mathrm{after}}(t) = L_{\mathrm{before}}(t)\quad\forall\, t",
        Text("largest difference of an epoch's loss", "各轮损失的最大差值"),
        Criterion("==", 0, EXACT),
        "x = np.random.default_rng(0).standard_normal((64, 3))\n"
        "a, b = (gl.ActivationDropout('relu', 0.3, order=order, generator=gl.Generator(1))\n"
        "        for order in ('after', 'before'))\n"
        "print(all((a(x) == b(x)).all() for step in range(100)))",
    ),
    Claim(
        "after-is-better",
        Text(
            "Often said: dropout belongs after the activation. For a sigmoid network, that is:",
            "常见说法：随机失活应放在激活函数之后。对 sigmoid 网络而言，即：",
        ),
        r"\overline{a_{\mathrm{after}} - a_{\mathrm{before}}} \geq 1\,\%",
        Text("mean difference of test accuracy, sigmoid, percentage points", "测试准确率的平均差（sigmoid，百分点）"),
        Criterion(">=", 1, Text("four of 360 test digits", "即 360 个测试数字中的四个")),
        "x = np.full((20_000, 100), 3.0)  # what a unit after it sees\n"
        'for order in ("after", "before"):\n'
        '    layer = gl.ActivationDropout("sigmoid", 0.5, order=order)\n'
        "    print(order, layer(x).mean(), layer.eval()(x).mean())",
        is_question=True,
    ),
)


def _layer(activation: str, order: str, seed: int = _SEED) -> ActivationDropout:
    return ActivationDropout(activation, _P, order=order, generator=Generator(seed))


def _formulas(lab: Lab) -> Results:
    """The layers against the textbook."""
    rng = np.random.default_rng(8)
    h = rng.standard_normal((30, 12))
    dy = rng.standard_normal((30, _UNITS))
    forward, gradient, at_zero = [], [], []
    for name, (phi, slope) in _PHI.items():
        for order in _ORDERS:
            linear = Linear(12, _UNITS, dtype="float64", seed=1).to(lab.device)
            x = on_cpu(linear(lab.place(h)))
            network = Sequential(linear, _layer(name, order))
            y = on_cpu(network(lab.place(h)))
            network.backward(lab.place(dy))
            mask = dropout_mask(x.size, _P, _SEED, 0).reshape(x.shape)
            m = mask / (1 - _P)
            expected = m * phi(x) if order == "after" else phi(m * x)
            forward.append(float(np.abs(y - expected).max()))
            delta = m * slope(x if order == "after" else m * x) * dy
            closed = delta.T @ h
            computed = on_cpu(network.gradients["0.weight"])
            gradient.append(float(np.abs(computed - closed).max() / np.abs(closed).max()))
            silent = 0.0 if order == "after" else float(phi(np.zeros(1))[0])
            at_zero.append(float(np.abs(y[~mask] - silent).max()))
    return {"forward": max(forward), "gradient": max(gradient), "phi-of-zero": max(at_zero), **_same_bits(lab)}


def _same_bits(lab: Lab) -> Results:
    """How many elements differ between the orders, by activation."""
    rng, counts = np.random.default_rng(9), {}
    for name in _PHI:
        different = 0
        for dtype in (np.float16, np.float32, np.float64):
            x, dy = (lab.place(rng.standard_normal(4001).astype(dtype)) for _ in range(2))
            results = []
            for order in _ORDERS:
                layer = _layer(name, order)
                results.append((layer(x), layer.backward(dy)))
            different += sum(different_bits(*pair) for pair in zip(*results, strict=True))
        counts[name] = different
    return {"bits": counts}


def _expectations(lab: Lab) -> list[Results]:
    """A unit after each activation and order: what it expects in training, measured and by the formula."""
    rng, draws, q = np.random.default_rng(10), lab.choose(40_000, 10_000), 1 - _P
    x, w = rng.uniform(-1, 5, _UNITS), rng.uniform(0, 2, _UNITS) / _UNITS
    tiled = lab.place(np.tile(x, (draws, 1)))
    rows = []
    for name, (phi, _) in _PHI.items():
        zero = float(phi(np.zeros(1))[0])
        for order in _ORDERS:
            layer = _layer(name, order, 34)
            z = on_cpu(layer(tiled)) @ w
            evaluated = float((on_cpu(layer.eval()(tiled[:1])) @ w)[0])
            if order == "after":
                shift, variance = 0.0, float(np.sum(w**2 * phi(x) ** 2) * _P / q)
            else:
                shift = float(np.sum(w * (q * phi(x / q) + _P * zero - phi(x))))
                variance = float(np.sum(w**2 * _P * q * (phi(x / q) - zero) ** 2))
            rows.append(
                {
                    "activation": name,
                    "order": order,
                    "shift": shift,
                    "measured": float(z.mean()) - evaluated,
                    "error": math.sqrt(variance / draws),
                    "variance": variance,
                    "measured variance": float(z.var(ddof=1)),
                    "variance error": variance * math.sqrt(2 / (draws - 1)),
                }
            )
    return rows


def _curves(lab: Lab) -> dict[tuple[str, str], Results]:
    """Digits, both orders, several activations."""
    data, seeds, epochs = digits(), lab.choose(2, 1), lab.choose(15, 4)
    x = flat(lab, data.x_test)
    runs: dict[tuple[str, str], Results] = {}
    total, done = len(_SHOWN) * len(_ORDERS) * seeds, 0
    for name in _SHOWN:
        for order in _ORDERS:
            losses, accuracies = [], []
            for seed in range(seeds):
                weights, masks = np.random.default_rng(seed), Generator(seed).spawn(2)
                layers: list[Layer] = []
                for features, mask in zip((64, 128), masks, strict=True):
                    layers += [
                        Linear(features, 128, seed=weights),
                        ActivationDropout(name, _P, order=order, generator=mask),
                    ]
                network = Sequential(*layers, Linear(128, 10, seed=weights))
                history: list[float] = []
                train_classifier(
                    lab,
                    network,
                    data,
                    epochs=epochs,
                    seed=seed,
                    after_epoch=lambda epoch, loss, history=history: history.append(loss),  # type: ignore[misc]
                )
                losses.append(history)
                accuracies.append(loss_and_accuracy(network.eval()(x), data.y_test)[1])
                done += 1
                lab.progress(done / total)
            runs[name, order] = {"losses": np.array(losses), "accuracies": np.array(accuracies)}
    return runs


def _conclude(parts: Results) -> Findings:
    formulas, rows, runs = parts["formulas"], parts["expectations"], parts["curves"]
    measured = {
        **{name: formulas[name] for name in ("forward", "gradient", "phi-of-zero")},
        "shift": max(abs(row["measured"] - row["shift"]) / row["error"] for row in rows),
        "variance": max(abs(row["measured variance"] - row["variance"]) / row["variance error"] for row in rows),
        "relu-either-way": formulas["bits"]["relu"],
        "relu-trains-the-same": float(np.abs(runs["relu", "after"]["losses"] - runs["relu", "before"]["losses"]).max()),
        "after-is-better": 100
        * float((runs["sigmoid", "after"]["accuracies"] - runs["sigmoid", "before"]["accuracies"]).mean()),
    }
    return Findings(
        measured,
        tables=(_shift_table(rows, formulas["bits"]), _training_table(runs)),
        figures=(_shift_figure(rows), _curve_figure(runs)),
    )


def _shift_table(rows: list[Results], bits: Mapping[str, int]) -> Table:
    before = [row for row in rows if row["order"] == "before"]
    return Table(
        Text(
            f"Dropout before the activation, p = {_P}: shift of a unit of the next layer",
            f"随机失活放在激活函数之前，p = {_P}：下一层某单元的期望偏移",
        ),
        (
            Text("activation", "激活函数"),
            same("φ(0)"),
            Text("shift, formula", "偏移（公式）"),
            Text("shift, measured", "偏移（实测）"),
            Text("variance, formula", "方差（公式）"),
            Text("variance, measured", "方差（实测）"),
            Text("elements that differ between the orders", "两种顺序间不同的元素个数"),
        ),
        [
            [
                row["activation"],
                f"{float(_PHI[row['activation']][0](np.zeros(1))[0]):g}",
                f"{row['shift']:.4f}",
                f"{row['measured']:.4f} ± {row['error']:.4f}",
                f"{row['variance']:.4f}",
                f"{row['measured variance']:.4f}",
                bits[row["activation"]],
            ]
            for row in before
        ],
    )


def _training_table(runs: Mapping[tuple[str, str], Results]) -> Table:
    seeds, epochs = runs["relu", "after"]["losses"].shape
    return Table(
        Text(
            f"64-128-128-10 on handwritten digits, p = {_P} twice, {epochs} epochs, mean of {seeds} seeds",
            f"手写数字上的 64-128-128-10 网络，两层 p = {_P}，训练 {epochs} 轮，{seeds} 个随机种子的均值",
        ),
        (
            Text("activation", "激活函数"),
            Text("last training loss, after", "最终训练损失（之后）"),
            Text("before", "（之前）"),
            Text("test accuracy, %, after", "测试准确率 %（之后）"),
            Text("before", "（之前）"),
        ),
        [
            [
                name,
                *(f"{runs[name, order]['losses'][:, -1].mean():.4f}" for order in _ORDERS),
                *(f"{100 * runs[name, order]['accuracies'].mean():.2f}" for order in _ORDERS),
            ]
            for name in _SHOWN
        ],
    )


@draw(
    "shift",
    Text(
        f"How far training moves the expectation of a unit of the next layer, p = {_P}: by the formula (bars) and "
        "measured (points, five standard errors).",
        f"训练时下一层单元期望的偏移，p = {_P}：公式（柱）与实测（点，误差线为五倍标准误差）。",
    ),
)
def _shift_figure(figure: Canvas, say: Say, rows: list[Results]) -> None:
    axes = figure.subplots()
    names = list(_PHI)
    for order, shift, colour, name in (
        ("after", -0.18, BLUE, Text("after the activation", "激活函数之后")),
        ("before", 0.18, ORANGE, Text("before the activation", "激活函数之前")),
    ):
        chosen = [row for row in rows if row["order"] == order]
        at = np.arange(len(names)) + shift
        axes.bar(at, [row["shift"] for row in chosen], width=0.34, color=colour, alpha=0.4, label=say(name))
        axes.errorbar(
            at,
            [row["measured"] for row in chosen],
            yerr=[5 * row["error"] for row in chosen],
            fmt=".",
            color=colour,
            capsize=3,
        )
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xticks(range(len(names)), names, rotation=25)
    axes.set_ylabel(say(Text("E[z] - z in evaluation", "E[z] - 推理时的 z")))
    axes.legend()


@draw(
    "curves",
    Text(
        "Training loss with dropout after and before the activation; for ReLU one curve hides the other.",
        "随机失活置于激活函数之后与之前的训练损失；ReLU 的两条曲线完全重合。",
    ),
    size=(5.4, 4.2),
)
def _curve_figure(figure: Canvas, say: Say, runs: Mapping[tuple[str, str], Results]) -> None:
    for number, (axes, name) in enumerate(zip(figure.subplots(2, 2, sharex=True).flat, _SHOWN, strict=True)):
        for order, colour, style, label in (
            ("after", BLUE, "-", Text("after", "之后")),
            ("before", ORANGE, "--", Text("before", "之前")),
        ):
            mean = runs[name, order]["losses"].mean(axis=0)
            axes.semilogy(np.arange(1, len(mean) + 1), mean, style, color=colour, label=say(label))
        axes.set_title(name)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if number == 0:
            axes.legend()
        if number >= 2:
            axes.set_xlabel(say(Text("epoch", "训练轮数")))
        if number % 2 == 0:
            axes.set_ylabel(say(Text("training loss", "训练损失")))


STUDY = Study(
    "placement",
    Text("Dropout before or after the activation?", "随机失活放在激活函数之前还是之后？"),
    Text(
        "For ReLU the order is no question. For every other activation, dropping the argument instead of the result "
        "makes a dropped unit phi(0), and moves what the next layer expects.",
        "对 ReLU 来说，顺序无关紧要。对其他激活函数，失活输入而不是输出，会使失活单元取值 φ(0)，并改变下一层的期望。",
    ),
    _CLAIMS,
    {"curves": _curves, "formulas": _formulas, "expectations": _expectations},
    _conclude,
)
