"""All node tests of the ``onnx`` package for its pooling operators."""

import importlib

import numpy as np
import onnx
import pytest

import gpu_layers as gl

OPERATORS = ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "MaxPool", "MaxUnpool")


def node_tests():
    """Importing the module of an operator collects its tests; collecting all of them takes a quarter of a minute."""
    package = importlib.import_module("onnx.backend.test.case.node")
    for operator in OPERATORS:
        importlib.import_module(f"{package.__name__}.{operator.lower()}")
    cases = {case.name: case for case in package._NodeTestCases if case.model.graph.node[0].op_type in OPERATORS}
    return list(cases.values())


CASES = node_tests()


def arguments(node, rank):
    """What our operations take for a node's attributes."""
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    taken = {}
    if "kernel_shape" in attributes:
        taken["kernel_size"] = tuple(attributes.pop("kernel_shape"))
        taken["stride"] = tuple(attributes.pop("strides", (1,) * rank))
    pads, auto = attributes.pop("pads", None), attributes.pop("auto_pad", b"NOTSET").decode()
    if auto.startswith("SAME"):
        taken["padding"] = auto.lower()
    elif pads is not None:
        taken["padding"] = tuple(zip(pads[:rank], pads[rank:], strict=True))
    if "dilations" in attributes:
        taken["dilation"] = tuple(attributes.pop("dilations"))
    if "ceil_mode" in attributes:
        taken["ceil_mode"] = bool(attributes.pop("ceil_mode"))
    return taken, attributes


def flat_in_tensor(indices, shape, column_major):
    """ONNX counts through the whole tensor, and in column-major planes if asked to."""
    batch, channels, *spatial = shape
    if column_major:
        places = np.unravel_index(indices, spatial)
        indices = np.ravel_multi_index(places, spatial, order="F")
    planes = np.arange(batch * channels).reshape(batch, channels, *(1,) * len(spatial))
    return planes * int(np.prod(spatial)) + indices


def max_pool(node, x, with_indices):
    taken, rest = arguments(node, x.ndim - 2)
    integral = x.dtype.kind == "u"  # ours are for floats, which hold 8-bit integers exactly
    y, saved = gl.ops.max_pool_forward(x.astype(np.float32) if integral else x, **taken)
    outputs = [y.astype(x.dtype)]
    if with_indices:
        outputs.append(flat_in_tensor(gl.ops.max_pool_indices(saved), x.shape, rest.pop("storage_order", 0)))
    assert rest == {}
    return outputs


def average_pool(node, x, _):
    taken, rest = arguments(node, x.ndim - 2)
    y, _ = gl.ops.avg_pool_forward(x, **taken, count_include_pad=bool(rest.pop("count_include_pad", 0)))
    assert rest == {}
    return [y]


def lp_pool(node, x, _):
    taken, rest = arguments(node, x.ndim - 2)
    y, _ = gl.ops.lp_pool_forward(x, rest.pop("p", 2), **taken)
    assert rest == {}
    return [y]


def global_pool(node, x, _):
    forward = gl.ops.adaptive_max_pool_forward if "Max" in node.op_type else gl.ops.adaptive_avg_pool_forward
    return [forward(x, (1,) * (x.ndim - 2))[0]]


def max_unpool(node, x, _, indices, output_shape=None):
    taken, rest = arguments(node, x.ndim - 2)
    assert rest == {}
    layer = getattr(gl, f"MaxUnpool{x.ndim - 2}d")(taken["kernel_size"], taken["stride"])
    # An index of ONNX is flat in the tensor of the default size, whatever size is asked for.
    default = layer._output_size(x, None)
    local = indices % int(np.prod(default))
    if output_shape is None:
        return [layer(x, local)]
    wide = tuple(int(size) for size in output_shape[2:])
    places = np.unravel_index(local, default)
    y, _ = gl.ops.max_unpool_forward(x, np.ravel_multi_index(places, wide), wide)
    return [y]


ADAPTERS = {
    "AveragePool": average_pool,
    "GlobalAveragePool": global_pool,
    "GlobalMaxPool": global_pool,
    "LpPool": lp_pool,
    "MaxPool": max_pool,
    "MaxUnpool": max_unpool,
}


def test_there_are_tests_of_every_operator():
    assert {case.model.graph.node[0].op_type for case in CASES} == set(OPERATORS)
    assert len(CASES) >= 50


@pytest.mark.parametrize("backend", ["reference", "emulated"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_node(case, backend):
    (node,) = case.model.graph.node
    for inputs, outputs in case.data_sets:
        x, *others = (np.asarray(value) for value in inputs)
        with gl.use_backend(backend):
            results = ADAPTERS[node.op_type](node, x, len(outputs) > 1, *others)
        assert len(results) == len(outputs)
        for result, expected in zip(results, outputs, strict=True):
            assert (result.shape, result.dtype) == (np.shape(expected), np.asarray(expected).dtype)
            # The tolerances of the package's own runner.
            np.testing.assert_allclose(result, expected, rtol=case.rtol, atol=case.atol)


@pytest.mark.parametrize("backend", ["reference", "emulated"])
@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("pads", [None, [1, 0], [1, 1]], ids=str)
@pytest.mark.parametrize("length", [3, 6, 8])
def test_powers_of_windows_that_ceil_mode_cuts_off(backend, p, pads, length):
    evaluator = pytest.importorskip("onnx.reference", reason="pip install onnx")
    kernel = 2 if pads is None else 3
    attributes = {} if pads is None else {"pads": pads}
    node = onnx.helper.make_node(
        "LpPool", ["x"], ["y"], p=p, kernel_shape=[kernel], strides=[2], ceil_mode=1, **attributes
    )
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node], "pool", [value("x", onnx.TensorProto.FLOAT, [1, 1, length])], [value("y", onnx.TensorProto.FLOAT, None)]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 22)])
    x = np.random.default_rng(length).standard_normal((1, 1, length)).astype(np.float32)
    (expected,) = evaluator.ReferenceEvaluator(model).run(None, {"x": x})
    with gl.use_backend(backend):
        y, _ = gl.ops.lp_pool_forward(x, p, (kernel,), 2, padding=0 if pads is None else (tuple(pads),), ceil_mode=True)
    # The evaluator takes powers, means and roots in float32: a few units in the last place.
    np.testing.assert_allclose(y, expected, rtol=1e-6)
