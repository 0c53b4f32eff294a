"""A training step as a CUDA graph: one launch per step, and fresh dropout masks in each.

It needs a GPU and CuPy; without, it says so. Run it: python examples/cuda_graph.py
"""

import time

import gpu_layers as gl


def seconds_of(run, cp, repeats=200):
    """Of one call, the device's work included."""
    run()
    cp.cuda.Device().synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    cp.cuda.Device().synchronize()
    return (time.perf_counter() - start) / repeats


def main():
    network = gl.Sequential(gl.BatchNorm1d(256), gl.ReLU(), gl.Dropout(0.1), gl.BatchNorm1d(256), gl.Dropout(0.1))
    try:
        network.to("cuda")
    except RuntimeError as error:
        print(f"CUDA graphs need a GPU: {error}")
        return None
    import cupy as cp

    gl.manual_seed(0)
    x = cp.random.default_rng(0).standard_normal((64, 256), dtype=cp.float32)

    def step():
        y = network(x)
        return y, network.backward(y)

    graph = gl.capture(step)
    first = graph.replay()[0].copy()
    second = graph.replay()[0].copy()
    print("two replays draw different masks:", bool((first != second).any()))

    # A call draws the mask that the next replay would have drawn: both count the same offsets.
    state = gl.default_generator.get_state()
    called = step()[0]
    gl.default_generator.set_state(state)
    replayed = graph.replay()[0].copy()
    print("a replay has the bits of a call:", bool((called == replayed).all()))

    calls, replays = seconds_of(step, cp), seconds_of(graph.replay, cp)
    print(f"a call takes {1e6 * calls:.0f} us, a replay {1e6 * replays:.0f} us")
    return first, second, called, replayed


if __name__ == "__main__":
    main()
