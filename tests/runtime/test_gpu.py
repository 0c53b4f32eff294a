"""The way to the driver, with a stand-in for what of CuPy needs a GPU: which code is loaded, what is passed, in whose
context. And CuPy's own packing of arguments, which needs none."""

from types import SimpleNamespace

import numpy as np
import pytest

import gpu_layers.kernels  # noqa: F401 - declares the kernels
from gpu_layers.runtime import gpu, headers, nvrtc
from gpu_layers.runtime.kernel import all_kernels
from gpu_layers.runtime.launch import _scalar
from tests.conftest import _why_no_gpu

RELU = next(kernel for kernel in all_kernels() if kernel.name == "relu_forward<float>")
SHARED_BY_DEFAULT = 48 * 1024


STATIC_SHARED = 200


def _kernel():
    return SimpleNamespace(max_dynamic_shared_size_bytes=SHARED_BY_DEFAULT, shared_size_bytes=STATIC_SHARED)


class FakeCupy:
    """One process with GPUs of some compute capability: notes what is loaded and launched, and which GPU is current."""

    def __init__(self, capability="90", supported=(75, 80, 90, 100), shared_optin=227 * 1024):
        self.current, self.loaded, self.launches = None, [], []
        functions = {}
        cupy = self

        class Device:
            def __init__(self, number):
                self.id = number
                self.compute_capability = capability
                self.attributes = {"MaxSharedMemoryPerBlockOptin": shared_optin, "MultiProcessorCount": 132}

            def __enter__(self):
                self.before, cupy.current = cupy.current, self.id

            def __exit__(self, *_):
                cupy.current = self.before

        class RawModule:
            def __init__(self, *, path, enable_cooperative_groups):
                assert isinstance(path, str)
                self.key = (path, enable_cooperative_groups, cupy.current)
                cupy.loaded.append(self.key)

            def get_function(self, symbol):
                # CuPy loads a file once a device: the driver's function, and what was set for it, are shared.
                key = (*self.key, symbol)
                kernel = functions.setdefault(key, _kernel())

                def function(grid, block, args, **options):
                    launch = SimpleNamespace(symbol=symbol, grid=grid, block=block, args=args, **options)
                    launch.device, launch.limit = cupy.current, kernel.max_dynamic_shared_size_bytes
                    cupy.launches.append(launch)

                function.ptr = 4711
                kernel.kernel = function
                return kernel

        def occupancy(function, threads, shared_bytes):
            assert function == 4711
            return min(228 * 1024 // (shared_bytes + STATIC_SHARED + 1024), 2048 // threads)

        driver = SimpleNamespace(occupancyMaxActiveBlocksPerMultiprocessor=occupancy)
        nvrtc_module = SimpleNamespace(getSupportedArchs=lambda: supported)
        self.cuda = SimpleNamespace(Device=Device, nvrtc=nvrtc_module, driver=driver)
        self.RawModule = RawModule


_CACHED = (gpu._architecture, gpu._raw_kernel, gpu._function, gpu.resident_blocks_of_gpu)


@pytest.fixture
def fake(monkeypatch):
    """Makes a stand-in for CuPy; forgets what was loaded before and after."""

    def make(**facts):
        cupy = FakeCupy(**facts)
        monkeypatch.setattr(gpu, "import_cupy", lambda: cupy)
        compiled = lambda source, names, architecture: SimpleNamespace(  # noqa: E731
            path=f"{source} {architecture}", symbols={name: f"_Z{name}" for name in names}
        )
        monkeypatch.setattr(gpu, "compiled_module", compiled)
        return cupy

    for cached in _CACHED:
        cached.cache_clear()
    yield make
    for cached in _CACHED:
        cached.cache_clear()


def start(device=0, shared_bytes=0, cooperative=False):
    gpu.launch_on_gpu(RELU, (2, 1, 1), (256, 1, 1), ["x", "y", np.int64(4)], device, shared_bytes, cooperative)


@pytest.mark.parametrize(
    ("capability", "supported", "expected"),
    [
        ("90", (75, 80, 90, 100), nvrtc.Architecture(90)),
        ("80", (75, 80, 90, 100), nvrtc.Architecture(80)),
        ("121", (75, 90, 120), nvrtc.Architecture(120, ptx=True)),  # newer than the compiler
        ("86", (75, 80, 90), nvrtc.Architecture(80, ptx=True)),
    ],
)
def test_code_is_the_gpus_own_or_text_that_the_driver_translates(fake, capability, supported, expected):
    cupy = fake(capability=capability, supported=supported)
    start()
    assert cupy.loaded == [(f"activation.cu {expected}", False, 0)]


def test_a_gpu_too_old_is_refused(fake):
    fake(capability="70")
    with pytest.raises(RuntimeError, match=r"does not support compute capability 7\.0"):
        start()


def test_names_of_architectures():
    assert nvrtc.options(nvrtc.Architecture(90))[0] == "--gpu-architecture=sm_90"
    assert nvrtc.options(nvrtc.Architecture(90, ptx=True))[0] == "--gpu-architecture=compute_90"


def test_a_kernel_is_loaded_once_a_device_in_its_context(fake):
    cupy = fake()
    for device in (0, 1, 0, 1):
        start(device)
    assert [device for _, _, device in cupy.loaded] == [0, 1]
    assert [launched.device for launched in cupy.launches] == [0, 1, 0, 1]
    assert cupy.current is None
    first = cupy.launches[0]
    assert (first.symbol, first.grid, first.block) == ("_Zrelu_forward<float>", (2, 1, 1), (256, 1, 1))
    assert first.args == ("x", "y", 4)
    assert (first.shared_mem, first.enable_cooperative_groups) == (0, False)


def test_cooperative_launches_are_told_to_both(fake):
    cupy = fake()
    start(cooperative=True)
    assert cupy.loaded[0][1]
    assert cupy.launches[0].enable_cooperative_groups


def test_shared_memory_beyond_the_default_is_asked_for(fake):
    cupy = fake()
    for amount in (1024, 100_000, 60_000, 100_000):
        start(shared_bytes=amount)
    assert [launched.limit for launched in cupy.launches] == [SHARED_BY_DEFAULT, 100_000, 100_000, 100_000]


def test_blocks_that_a_gpu_holds_at_once(fake):
    cupy = fake()
    assert gpu.resident_blocks_of_gpu(RELU, 256, 0, 0, True) == 8 * 132
    assert gpu.resident_blocks_of_gpu(RELU, 256, 108 * 1024, 0, True) == 2 * 132
    assert gpu.resident_blocks_of_gpu(RELU, 256, 227 * 1024 - STATIC_SHARED, 0, True) == 132
    assert all(cooperative for _, cooperative, _ in cupy.loaded)
    assert cupy.current is None


@pytest.mark.parametrize("cooperative", [True, False])
def test_asking_what_a_gpu_holds_loads_what_is_launched(fake, cooperative):
    cupy = fake()
    gpu.resident_blocks_of_gpu(RELU, 256, 0, 0, cooperative)
    start(cooperative=cooperative)
    assert [of for _, of, _ in cupy.loaded] == [cooperative]


def test_a_gpu_with_too_little_shared_memory_holds_none(fake):
    fake(capability="75", shared_optin=64 * 1024)
    assert gpu.resident_blocks_of_gpu(RELU, 256, 64 * 1024 - STATIC_SHARED, 0, True) > 0
    assert gpu.resident_blocks_of_gpu(RELU, 256, 64 * 1024, 0, True) == 0


def zeros_of(kernel):
    """What a launch passes on for the parameters that are no arrays."""
    values = [parameter for parameter in kernel.parameters if not parameter.is_pointer]
    return [_scalar(kernel, parameter, np.zeros((), parameter.dtype)[()]) for parameter in values]


def test_cupy_takes_every_scalar_and_struct_that_is_passed():
    """CuPy gives the driver the address of a NumPy array of one element, of the declared type: no copy, no cast."""
    cupy_function = pytest.importorskip("cupy.cuda.function")
    if _why_no_gpu() is None:
        pytest.skip("GPU: there is one, and every kernel is launched on it")
    function = cupy_function.Function.__new__(cupy_function.Function)
    dtypes = set()
    for kernel in all_kernels():
        values = zeros_of(kernel)
        dtypes.update(value.dtype for value in values)
        for value in values:
            assert cupy_function.CNumpyArray(value).ptr == value.ctypes.data
        # Arguments are packed before a driver is asked for; what CuPy does not take is a TypeError.
        with pytest.raises(RuntimeError, match="cudaError"):
            function((1,), (1,), tuple(values), stream=SimpleNamespace(ptr=0))
    assert any(dtype.names for dtype in dtypes)
    with pytest.raises(TypeError):
        function((1,), (1,), (np.zeros(2),), stream=SimpleNamespace(ptr=0))


def test_headers_are_found_where_packages_are(monkeypatch, tmp_path):
    for folder, name in (("packages/nvidia/cu13/include", "cuda_fp16.h"), ("toolkit/include", "cuda_fp16.h")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).touch()
    target = tmp_path / "more/cupy/_core/include/cupy/_cccl/libcudacxx"
    (target / "nv").mkdir(parents=True)
    (target / "nv/target").touch()
    for variable in ("CUDA_PATH", "CUDA_HOME", "CONDA_PREFIX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("sys.path", ["", str(tmp_path / "packages"), str(tmp_path / "more")])
    assert headers.cuda_header_folders() == [tmp_path / "packages/nvidia/cu13/include", target]
    monkeypatch.setattr("sys.path", [str(tmp_path / "more")])
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path / "toolkit"))
    assert headers.cuda_header_folders() == [tmp_path / "toolkit/include", target]
    monkeypatch.delenv("CONDA_PREFIX")
    compiler = tmp_path / "toolkit/bin/nvcc"
    compiler.parent.mkdir()
    compiler.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(compiler.parent))
    assert headers.cuda_header_folders() == [tmp_path / "toolkit/include", target]
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "packages/nvidia/cu13"))
    assert headers.cuda_header_folders()[0] == tmp_path / "packages/nvidia/cu13/include"
