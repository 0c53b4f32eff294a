"""Study: what dropout does in evaluation, and what the full network has to do with the sampled ones."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from gpu_layers.layers import (
    ActivationDropout,
    AlphaDropout,
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    DropPath,
    FeatureAlphaDropout,
    Layer,
    ReLU,
)
from gpu_layers.layers.linear import Linear
from gpu_layers.layers.sequential import Sequential
from gpu_layers.models.uncertainty import mc_dropout
from gpu_layers.random import Generator
from gpu_layers.study.claims import Cell, Claim, Criterion, Findings, Results, Study, Table, Text, same
from gpu_layers.study.figures import BLUE, GREEN, GREY, ORANGE, Canvas, Say, draw
from gpu_layers.study.lab import Lab, different_bits, on_cpu
from gpu_layers.study.networks import flat, loss_and_accuracy, train_classifier
from gpu_layers.study.texts import EXACT, FIVE_ERRORS
from gpu_layers.training.dataset import Dataset, digits

_P = 0.5
_WIDTH = 128
_PASSES = 200
_SIZES = (1, 2, 5, 10, 20, 50, 100, 200)
_DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)

_LOGIT_REASON = Text(
    "exact for a linear network; after a ReLU, the mean of the function is not quite the function of the mean",
    "对线性网络严格成立；经过 ReLU 之后，函数的均值与均值的函数略有出入",
)
_CLAIMS = (
    Claim(
        "identity",
        Text(
            "In evaluation inverted dropout is the identity, bit for bit: NaN, infinities and -0 included.",
            "推理时，反向随机失活就是恒等映射，逐位相同，包括 NaN、无穷大和 -0。",
        ),
        r"D_{\mathrm{eval}}(x) = x",
        Text(
            "elements with a different bit: eight layers, four dtypes", "存在不同比特的元素个数（八种层、四种数据类型）"
        ),
        Criterion("==", 0, EXACT),
        "x = np.array([np.nan, -0.0, np.inf, 1e-45, 3.0], np.float32)\n"
        "y = gl.Dropout(0.5).eval()(x)\n"
        "print(y.tobytes() == x.tobytes())",
    ),
    Claim(
        "inverted-needs-nothing",
        Text(
            "A network trained with inverted dropout needs no change at test time: its logits have the size that they "
            "had on average in training.",
            "用反向随机失活训练的网络在测试时无需任何改动：logit 的大小与训练时的平均值一致。",
        ),
        r"E_m[z] = s\,z_{\mathrm{eval}},\qquad s = 1",
        Text(
            "|slope of evaluation logits against mean sampled logits - 1|, largest over the seeds",
            "|推理 logit 对抽样平均 logit 的斜率 - 1|（取各随机种子的最大值）",
        ),
        Criterion("<=", 0.1, _LOGIT_REASON),
        "x, w = np.ones((1, 64)), np.full((64, 1), 1 / 64)\n"
        "dropout = gl.Dropout(0.5)\n"
        "print(np.mean([dropout(x) @ w for _ in range(500)]), dropout.eval()(x) @ w)",
    ),
    Claim(
        "unscaled-needs-correction",
        Text(
            "Trained unscaled and evaluated as it is, the same network's logits are too large by 1/(1-p) for each "
            "dropout layer: four times for two layers at p = 0.5.",
            "训练时不缩放、推理时也不修正，则每经过一个随机失活层，logit 就偏大 1/(1-p) 倍：p = 0.5 的两层共偏大四倍。",
        ),
        r"s = (1-p)^{-2} = 4",
        Text("|slope (1-p)² - 1|, largest over the seeds", "|斜率 × (1-p)² - 1|（取各随机种子的最大值）"),
        Criterion("<=", 0.1, _LOGIT_REASON),
        "x, w = np.ones((1, 64)), np.full((64, 1), 1 / 64)\n"
        'dropout = gl.Dropout(0.5, scaling="inference")\n'
        "print(np.mean([dropout(x) @ w for _ in range(500)]), x @ w)",
    ),
    Claim(
        "correction",
        Text("Multiplying by 1-p in evaluation puts that right.", "推理时乘以 1-p 即可纠正。"),
        r"D_{\mathrm{eval}}(x) = (1-p)\,x \ \Rightarrow\ s = 1",
        Text("|slope - 1|, largest over the seeds", "|斜率 - 1|（取各随机种子的最大值）"),
        Criterion("<=", 0.1, _LOGIT_REASON),
        "x, w = np.ones((1, 64)), np.full((64, 1), 1 / 64)\n"
        'dropout = gl.Dropout(0.5, scaling="inference")\n'
        "print(np.mean([dropout(x) @ w for _ in range(500)]), dropout.eval()(x) @ w)",
    ),
    Claim(
        "linear-average",
        Text(
            "Between dropout and a linear output the average of the sampled networks is exactly the full network: the "
            "mean of their logits, and so the normalised geometric mean of their probabilities.",
            "若随机失活之后直接是线性输出层，则所有抽样子网络的平均恰好就是完整网络："
            "logit 的均值如此，概率的归一化几何平均也随之如此。",
        ),
        r"\frac{1}{T}\sum_{t=1}^{T} z_t \rightarrow z_{\mathrm{eval}},\qquad"
        r"\mathrm{softmax}(\overline{z}) \propto \left(\prod_t \mathrm{softmax}(z_t)\right)^{1/T}",
        Text(
            "distance of the mean logit, in standard errors, largest of 100 logits",
            "平均 logit 的偏差（以标准误差为单位，取 100 个 logit 中的最大值）",
        ),
        Criterion("<=", 5, FIVE_ERRORS),
        "x, w = np.arange(8.0), np.linspace(-1, 1, 8)\n"
        "dropout = gl.Dropout(0.5)\n"
        "mean, variance = gl.mc_dropout(dropout, x, 4000)\n"
        "print(mean @ w, dropout.eval()(x) @ w)",
    ),
    Claim(
        "average-converges",
        Text(
            "The mean of T sampled networks approaches it like one over the root of T.",
            "T 个抽样子网络的均值以 T 的负二分之一次方的速度趋近于它。",
        ),
        r"\left\Vert \overline{z}_T - z_{\mathrm{eval}} \right\Vert \sim T^{-1/2}",
        Text("|exponent + 1/2|, fitted from T = 1 to 200", "|拟合指数 + 1/2|（T 取 1 至 200）"),
        Criterion("<=", 0.1, Text("the fit of eight random distances", "由八个带随机性的距离拟合而得")),
        "x = np.ones(1000)\n"
        "for passes in (1, 100, 10_000):\n"
        "    mean, _ = gl.mc_dropout(gl.Dropout(0.5), x, passes)\n"
        "    print(passes, np.sqrt(np.mean((mean - x) ** 2)))",
    ),
    Claim(
        "accuracy-suffers",
        Text("Often said: without the correction, accuracy suffers.", "常见说法：不做修正，准确率会下降。"),
        r"\overline{a_{\mathrm{corrected}}-a_{\mathrm{as\ is}}} \geq 1\,\%",
        Text("mean loss of test accuracy, percentage points", "测试准确率的平均下降（百分点）"),
        Criterion(">=", 1, Text("four of 360 test digits", "即 360 个测试数字中的四个")),
        "h, w = np.array([1.0, 2.0, 0.5]), np.array([[1.0, -1], [0, 0.5], [2, 1]])\n"
        "for factor in (0.5, 1.0):  # without a bias the largest logit stays the largest\n"
        "    print((factor * h @ w).argmax())",
        is_question=True,
    ),
    Claim(
        "average-accuracy",
        Text(
            "Often said: the full network is as good as averaging many sampled ones.",
            "常见说法：完整网络的准确率与许多抽样子网络的平均相当。",
        ),
        r"\left|a_{\mathrm{full}}-a_{T=200}\right| \leq 1\,\%",
        Text(
            "mean difference of test accuracy over the seeds, percentage points",
            "各随机种子测试准确率之差的均值（百分点）",
        ),
        Criterion("<=", 1, Text("four of 360 test digits", "即 360 个测试数字中的四个")),
        "x, w = np.arange(8.0), np.eye(8)[:, :3]\n"
        "dropout = gl.Dropout(0.5)\n"
        "mean, variance = gl.mc_dropout(dropout, x, 200)\n"
        "print((mean @ w).argmax(), (dropout.eval()(x) @ w).argmax())",
        is_question=True,
    ),
)


def _identity(lab: Lab) -> Results:
    """How many elements the layers change in evaluation."""
    layers = {
        "Dropout": (Dropout(_P), (5, 7)),
        "Dropout1d": (Dropout1d(_P), (3, 4, 5)),
        "Dropout2d": (Dropout2d(_P), (2, 3, 4, 5)),
        "Dropout3d": (Dropout3d(_P), (2, 3, 2, 3, 4)),
        "AlphaDropout": (AlphaDropout(_P), (5, 7)),
        "FeatureAlphaDropout": (FeatureAlphaDropout(_P), (3, 4, 5)),
        "DropPath": (DropPath(_P), (5, 7)),
        "ActivationDropout('identity')": (ActivationDropout("identity", _P), (5, 7)),
    }
    rng, rows, changed = np.random.default_rng(5), [], 0
    for name, (layer, shape) in layers.items():
        counts = []
        for dtype in _DTYPES:
            x = rng.standard_normal(shape).astype(dtype)
            x.reshape(-1)[:4] = [np.nan, -0.0, np.inf, -np.inf]
            counts.append(different_bits(layer.eval()(lab.place(x)), x))
        changed += sum(counts)
        rows.append([name, *counts])
    return {"changed": changed, "rows": rows}


def _network(scaling: str, seed: int) -> Sequential:
    weights = np.random.default_rng(seed)
    masks = Generator(seed).spawn(2)
    layers: list[Layer] = []
    for features, mask in zip((64, _WIDTH), masks, strict=True):
        layers += [Linear(features, _WIDTH, seed=weights), ReLU(), Dropout(_P, scaling=scaling, generator=mask)]
    return Sequential(*layers, Linear(_WIDTH, 10, seed=weights))


def _trained(lab: Lab) -> Results:
    """Networks trained both ways, evaluated with and without the correction, and averaged."""
    data, seeds = digits(), lab.choose(4, 1)
    runs = []
    for number in range(2 * seeds):
        seed, scaling = number // 2, ("inverted", "inference")[number % 2]
        network = _network(scaling, seed)
        train_classifier(lab, network, data, epochs=lab.choose(20, 5), seed=seed)
        runs.append(_evaluated(lab, network, scaling, seed, data))
        lab.progress((number + 1) / (2 * seeds + 1))
    return {"runs": runs, "average": _averages(lab, network, data)}


def _evaluated(lab: Lab, network: Sequential, scaling: str, seed: int, data: Dataset) -> Results:
    x = flat(lab, data.x_test)
    sampled = on_cpu(mc_dropout(network, x, _PASSES)[0])
    ways = {}
    for way in ("inverted", "inference"):
        model = _network(way, seed).to(lab.device)
        model.load_state_dict(network.state_dict())
        logits = model.eval()(x)
        loss, accuracy = loss_and_accuracy(logits, data.y_test)
        wide = on_cpu(logits).astype(np.float64)
        ways[way] = {"loss": loss, "accuracy": accuracy, "slope": float((wide * sampled).sum() / (sampled**2).sum())}
    _, averaged = loss_and_accuracy(sampled, data.y_test)
    _, single = loss_and_accuracy(on_cpu(mc_dropout(network, x, 1)[0]), data.y_test)
    return {"scaling": scaling, "ways": ways, "averaged": averaged, "single": single}


def _averages(lab: Lab, network: Sequential, data: Dataset) -> Results:
    """Means of T sampled networks against the full one: the last dropout layer alone, and both."""
    x = flat(lab, data.x_test)
    network.eval()
    features = x
    for layer in network.layers[:-2]:
        features = layer(features)
    top = Sequential(Dropout(_P, generator=Generator(21)), network.layers[-1])
    # As trained: whatever its scaling, this part is asked about inverted dropout.
    both = _network("inverted", 0).to(lab.device)
    both.load_state_dict(network.state_dict())
    distances: dict[str, list[float]] = {}
    for name, model, inputs in (("one", top, features), ("both", both, x)):
        full = on_cpu(model.eval()(inputs)).astype(np.float64)
        distances[name] = [
            float(np.sqrt(np.mean((on_cpu(mc_dropout(model, inputs, passes)[0]) - full) ** 2)) / full.std())
            for passes in _SIZES
        ]
    few = features[:10]
    full = on_cpu(top.eval()(few)).astype(np.float64)
    mean, variance = (on_cpu(array).astype(np.float64) for array in mc_dropout(top, few, lab.choose(4000, 500)))
    errors = np.sqrt(variance / lab.choose(4000, 500))
    return {"distances": distances, "deviation": float(np.max(np.abs(mean - full) / errors))}


def _conclude(parts: Results) -> Findings:
    runs, average = parts["trained"]["runs"], parts["trained"]["average"]
    inverted = [run for run in runs if run["scaling"] == "inverted"]
    unscaled = [run for run in runs if run["scaling"] == "inference"]
    q = 1 - _P

    def furthest(chosen: list[Results], way: str, factor: float = 1.0) -> float:
        return max(abs(run["ways"][way]["slope"] * factor - 1) for run in chosen)

    exponent = np.polyfit(np.log(_SIZES), np.log(average["distances"]["one"]), 1)[0]
    measured = {
        "identity": parts["identity"]["changed"],
        "inverted-needs-nothing": furthest(inverted, "inverted"),
        "unscaled-needs-correction": furthest(unscaled, "inverted", q**2),
        "correction": furthest(unscaled, "inference"),
        "linear-average": average["deviation"],
        "average-converges": abs(float(exponent) + 0.5),
        "accuracy-suffers": 100
        * float(
            np.mean([run["ways"]["inference"]["accuracy"] - run["ways"]["inverted"]["accuracy"] for run in unscaled])
        ),
        "average-accuracy": 100
        * abs(float(np.mean([run["averaged"] - run["ways"]["inverted"]["accuracy"] for run in inverted]))),
    }
    return Findings(
        measured,
        tables=(_accuracy_table(inverted, unscaled), _identity_table(parts["identity"]["rows"])),
        figures=(_scale_figure(inverted, unscaled), _average_figure(average["distances"])),
    )


_WAYS = (
    (Text("trained inverted, as is", "反向随机失活训练，不修正"), "inverted", "inverted", BLUE),
    (Text("trained unscaled, as is", "不缩放训练，不修正"), "inference", "inverted", ORANGE),
    (Text("trained unscaled, times 1-p", "不缩放训练，推理乘 1-p"), "inference", "inference", GREEN),
)


def _accuracy_table(inverted: list[Results], unscaled: list[Results]) -> Table:
    rows: list[list[Cell]] = []
    for name, scaling, way, _ in _WAYS:
        chosen = inverted if scaling == "inverted" else unscaled
        values = [[run["ways"][way][what] for run in chosen] for what in ("accuracy", "loss", "slope")]
        rows.append([name, f"{100 * np.mean(values[0]):.2f}", *(f"{np.mean(one):.3f}" for one in values[1:])])
    for name, key in (
        (Text("inverted, one sampled network", "反向随机失活，单个抽样子网络"), "single"),
        (Text("inverted, mean of 200", "反向随机失活，200 个子网络的平均"), "averaged"),
    ):
        rows.append([name, f"{100 * np.mean([run[key] for run in inverted]):.2f}", "", ""])
    return Table(
        Text(
            f"64-128-128-10 on handwritten digits, p = {_P} twice, mean of {len(inverted)} seeds",
            f"手写数字上的 64-128-128-10 网络，两层 p = {_P}，{len(inverted)} 个随机种子的均值",
        ),
        (
            Text("network", "网络"),
            Text("test accuracy, %", "测试准确率（%）"),
            Text("test loss", "测试损失"),
            Text("logit scale s", "logit 比例 s"),
        ),
        rows,
    )


def _identity_table(rows: list[list[Cell]]) -> Table:
    return Table(
        Text("Elements changed by a layer in evaluation", "推理时被各层改变的元素个数"),
        (Text("layer", "层"), *(same(np.dtype(dtype).name) for dtype in _DTYPES)),
        rows,
    )


@draw(
    "scale",
    Text(
        "Logits in evaluation, relative to their mean over sampled masks; a point for each seed.",
        "推理时的 logit 与其在抽样掩码下的均值之比；每个点对应一个随机种子。",
    ),
    size=(5.4, 2.3),
)
def _scale_figure(figure: Canvas, say: Say, inverted: list[Results], unscaled: list[Results]) -> None:
    axes = figure.subplots()
    for row, (_, scaling, way, colour) in enumerate(_WAYS):
        chosen = inverted if scaling == "inverted" else unscaled
        slopes = [run["ways"][way]["slope"] for run in chosen]
        axes.barh(row, np.mean(slopes), color=colour, alpha=0.5, height=0.55)
        axes.plot(slopes, [row] * len(slopes), "o", color=colour, markersize=4)
        axes.annotate(
            f"{np.mean(slopes):.2f}", (max(slopes), row), xytext=(6, 0), textcoords="offset points", va="center"
        )
    axes.axvline(1, color=GREY, linestyle="--", linewidth=1.2)
    axes.set_xlim(0, 4.7)
    axes.set_yticks(range(len(_WAYS)), [say(name) for name, *_ in _WAYS])
    axes.invert_yaxis()
    axes.set_xlabel(say(Text("size of evaluation logits, training = 1", "推理 logit 的大小（训练时 = 1）")))


@draw(
    "average",
    Text(
        "Root mean square distance of the mean logits from the full network's, in standard deviations of the "
        "logits. With a ReLU between two dropout layers a small difference remains.",
        "平均 logit 与完整网络 logit 的均方根距离（以 logit 的标准差为单位）。"
        "两个随机失活层之间有 ReLU 时，会留下一点差异。",
    ),
)
def _average_figure(figure: Canvas, say: Say, distances: Mapping[str, list[float]]) -> None:
    axes = figure.subplots()
    for key, name, colour in (
        ("one", Text("one dropout layer, before the output", "仅输出层之前的一层"), BLUE),
        ("both", Text("both dropout layers", "两个随机失活层"), ORANGE),
    ):
        axes.loglog(_SIZES, distances[key], "o-", color=colour, label=say(name), markersize=4)
    first = distances["one"][0]
    axes.loglog(_SIZES, [first / np.sqrt(size) for size in _SIZES], "--", color=GREY, label="$T^{-1/2}$")
    axes.set_xlabel(say(Text("sampled networks T", "抽样子网络数 T")))
    axes.set_ylabel(say(Text("distance from the full network", "与完整网络的距离")))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend()


STUDY = Study(
    "evaluation",
    Text("What changes at test time?", "测试时有什么不同？"),
    Text(
        "Inverted dropout changes nothing in evaluation; unscaled dropout has to be corrected there. The full network "
        "stands for the average of all networks that masks cut out of it.",
        "反向随机失活在推理时什么也不改变；不缩放的随机失活则必须在推理时修正。"
        "完整网络代表了由各种掩码裁出的所有子网络的平均。",
    ),
    _CLAIMS,
    {"trained": _trained, "identity": _identity},
    _conclude,
)
