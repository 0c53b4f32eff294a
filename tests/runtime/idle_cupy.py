"""A stand-in for CuPy whose GPU does nothing: what it is asked to do is noted, the array library's work as well.

Its arrays are NumPy's, of a type of their own, and all work on them is noted that would start a kernel of CuPy's or a
copy. Launches of ours leave the memory as it is, and none is touched of large arrays. So operations and layers run as
on a GPU up to the driver, on shapes of any size, and so quickly that tests can count over all of them.
"""

import contextlib
import sys
from itertools import groupby
from types import SimpleNamespace

import numpy as np

from gpu_layers.runtime import arrays, gpu, nvrtc
from tests.runtime.fake_cupy import device_class, driver, nothing_loaded

#: What the GPU is asked for. A copy is one from the host or of bytes, without a kernel.
LAUNCH, MEMSET, COPY, LIBRARY, READ_BACK = "launch", "memset", "copy", "library", "read back"
_ALIGNMENT = 512  # as CuPy's memory
# Bytes up to which memory is zeros at first: it is read back, or by the host.
_SMALL = 2**20
# Functions of the array library that start nothing.
_FREE = {"empty", "empty_like", "may_share_memory", "shares_memory", "ndim", "shape", "size", "broadcast_shapes"}
# Those that give another view; of what has none they make a copy.
_VIEWS = {"reshape", "ravel", "transpose", "moveaxis", "swapaxes", "expand_dims", "squeeze", "broadcast_to"}
_VIEWS |= {"ascontiguousarray", "asarray", "atleast_1d", "split", "array_split"}


class Memory:
    """Some bytes of the GPU."""

    def __init__(self, size):
        whole = (np.zeros if size <= _SMALL else np.empty)(size + _ALIGNMENT, np.uint8)
        first = -whole.ctypes.data % _ALIGNMENT
        self.bytes = whole[first : first + size]
        self.memory, self.ptr, self.device_id = self, whole.ctypes.data + first, 0

    def __add__(self, offset):
        return Pointer(self, self.ptr + offset)


class Pointer:
    """A place in memory."""

    def __init__(self, memory, ptr):
        self.memory, self.ptr, self.device_id = memory, ptr, 0

    def __add__(self, offset):
        return Pointer(self.memory, self.ptr + offset)

    def copy_from_device_async(self, source, size):
        Array.cupy.note(COPY)


class Array(np.ndarray):
    """An array of the stand-in."""

    cupy = None

    def __new__(cls, shape, dtype=float, data=None, strides=None):
        dtype, shape = np.dtype(dtype), (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
        if data is None:
            data = Memory(int(np.prod(shape)) * dtype.itemsize)
        memory = data.memory
        array = super().__new__(cls, shape, dtype, memory.bytes, data.ptr - memory.ptr, strides)
        array.memory = memory
        return array

    def __array_finalize__(self, of):
        self.memory = getattr(of, "memory", None)

    @property
    def data(self):
        return Pointer(self.memory, self.ctypes.data)

    @property
    def device(self):
        return self.cupy.cuda.Device(0)

    def __array_ufunc__(self, function, method, *given, **options):
        self.cupy.note(LIBRARY)
        return _placed(getattr(function, method)(*_plain(given), **_plain(options)), options.get("out"))

    def __array_function__(self, function, types, given, options):
        return self.cupy.called(function, given, options)

    def __getitem__(self, place):
        part = super().__getitem__(place)
        if isinstance(part, np.generic):
            # Of one element CuPy has a view.
            return super().__getitem__((*(place if isinstance(place, tuple) else (place,)), ...))
        if np.may_share_memory(_plain(part), _plain(self)):
            return part
        self.cupy.note(LIBRARY)
        return _placed(_plain(part))

    def __setitem__(self, place, value):
        self.cupy.note(LIBRARY if isinstance(value, Array) or np.isscalar(value) else COPY)
        _plain(self)[_plain(place)] = _plain(value)

    def fill(self, value):
        self[...] = value

    def copy(self, order="C"):
        self.cupy.note(LIBRARY)
        return _placed(_plain(self).copy(order))

    def astype(self, dtype, copy=True, **options):
        if not copy and self.dtype == dtype:
            return self
        self.cupy.note(LIBRARY)
        return _placed(_plain(self).astype(dtype, **options))

    def get(self, *_, **__):
        self.cupy.note(READ_BACK)
        return _plain(self).copy()

    def item(self, *place):
        return self.get().item(*place)

    def tolist(self):
        return self.get().tolist()

    def __bool__(self):
        return bool(self.get())

    def __int__(self):
        return int(self.get())

    __index__ = __int__

    def __float__(self):
        return float(self.get())


def _plain(one):
    """The same in NumPy's arrays."""
    if isinstance(one, Array):
        return one.view(np.ndarray)
    if isinstance(one, dict):
        return {name: _plain(value) for name, value in one.items()}
    return type(one)(map(_plain, one)) if type(one) in (tuple, list) else one


def _placed(result, out=None):
    """What the array library gives, in memory of the GPU."""
    if out is not None:
        return out[0] if isinstance(out, tuple) else out
    if isinstance(result, (tuple, list)):
        return type(result)(map(_placed, result))
    if not isinstance(result, (np.ndarray, np.generic)):
        return result
    array = Array(result.shape, result.dtype)
    array.view(np.ndarray)[...] = result
    return array


class IdleCupy:
    """One process with a GPU that does nothing.

    Attributes
    ----------
    asked : list of (str, str)
        What the GPU was asked for, and of launches the kernel's name.
    """

    ndarray = Array

    def __init__(self):
        self.current, self.asked, symbols = 0, [], []
        Array.cupy = cupy = self

        class RawModule:
            def __init__(self, *, path, enable_cooperative_groups):
                pass

            def get_function(self, symbol):
                symbols.append(symbol)
                return SimpleNamespace(shared_size_bytes=0, kernel=SimpleNamespace(ptr=len(symbols) - 1))

        def launched(function, *_):
            cupy.note(LAUNCH, symbols[function])

        self.RawModule = RawModule
        stream = SimpleNamespace(ptr=7, is_capturing=lambda: False)
        self.cuda = SimpleNamespace(
            Device=device_class(self, "90", 132),
            alloc=Memory,
            device=SimpleNamespace(get_device_id=lambda: self.current),
            driver=driver(launched, occupancyMaxActiveBlocksPerMultiprocessor=lambda *_: 2),
            runtime=SimpleNamespace(memsetAsync=lambda *_: cupy.note(MEMSET), getDeviceCount=lambda: 1),
            get_current_stream=lambda: stream,
        )

    def note(self, what, name=""):
        self.asked.append((what, name))

    def steps(self, call):
        """What a call asks for, in order: ``memset, 1`` is a memset and then a launch."""
        self.asked.clear()
        call()
        parts = []
        for what, of_kind in groupby(what for what, _ in self.asked):
            number = len(list(of_kind))
            parts += [str(number)] if what == LAUNCH else [what] * number
        return ", ".join(parts)

    def kernels(self):
        """The templates of the kernels that the last call launched."""
        return {name.split("<")[0] for what, name in self.asked if what == LAUNCH}

    def empty(self, shape, dtype=float):
        return Array(shape, dtype)

    def asarray(self, values, dtype=None, **_):
        return values if isinstance(values, Array) and dtype in (None, values.dtype) else self.array(values, dtype)

    def array(self, values, dtype=None, copy=True, **_):
        self.note(LIBRARY if isinstance(values, Array) else COPY)
        return _placed(np.array(_plain(values), dtype))

    def called(self, function, given, options):
        """A function of NumPy's in place of the array library's of the same name."""
        name, result = function.__name__, function(*_plain(given), **_plain(options))
        if name == "empty_like":
            return Array(result.shape, result.dtype)
        of = [one for one in given if isinstance(one, Array)]
        if name in _VIEWS and of and np.may_share_memory(_plain(of[0]), result):
            view = result.view(Array)
            view.memory = of[0].memory
            return view
        if name not in _FREE:
            self.note(LIBRARY)
        return _placed(result, options.get("out"))

    def __getattr__(self, name):
        found = getattr(np, name)
        if isinstance(found, type) or not callable(found):
            return found
        return lambda *given, **options: self.called(found, given, options)


@contextlib.contextmanager
def idle_cupy(monkeypatch):
    """The stand-in in CuPy's place."""
    cupy = IdleCupy()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(gpu, "architecture_for", nvrtc.Architecture)
    compiled = lambda source, names, architecture: SimpleNamespace(path=source, symbols={n: n for n in names})  # noqa: E731
    monkeypatch.setattr(gpu, "compiled_module", compiled)
    # Programs belong to a kind: none is left from another stand-in.
    monkeypatch.setitem(arrays.KINDS, Array, arrays.CupyArrays())
    with nothing_loaded():
        yield cupy
