"""The way to the driver, with a stand-in for what of CuPy needs a GPU: which code is loaded, what is passed, in whose
context."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

import gpu_layers.kernels  # noqa: F401 - declares the kernels
from gpu_layers.core import headers
from gpu_layers.runtime import gpu, nvrtc
from gpu_layers.runtime.kernel import all_kernels
from gpu_layers.runtime.steps import Allocate, Compute, CooperativeLaunchRefusedError, Launch, Slot, Views
from tests.runtime.fake_cupy import SHARED_BY_DEFAULT, STATIC_SHARED, CUDADriverError, stand_in

RELU = next(kernel for kernel in all_kernels() if kernel.name == "relu_forward<float>")


@pytest.fixture
def fake(monkeypatch):
    with stand_in(monkeypatch) as make:
        yield make


def launch_of(shared_bytes=0, cooperative=False):
    """Of relu_forward(x, y, nullptr, 4), with x and y in the slots 1 and 0."""
    arguments = (Slot(1), Slot(0), None, np.asarray(4, np.int64))
    return Launch(RELU, (2, 1, 1), (256, 1, 1), arguments, shared_bytes, cooperative)


def start(cupy, device=0, shared_bytes=0, cooperative=False, slots=(70, 80)):
    with cupy.cuda.Device(device):
        gpu.bound_launches([launch_of(shared_bytes, cooperative)], 2, device)(None, list(slots), None)


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
    start(cupy)
    assert cupy.loaded == [(f"activation.cu {expected}", False, 0)]


def test_a_gpu_too_old_is_refused(fake):
    cupy = fake(capability="70")
    with pytest.raises(RuntimeError, match=r"does not support compute capability 7\.0"):
        start(cupy)


def test_names_of_architectures():
    assert nvrtc.options(nvrtc.Architecture(90))[0] == "--gpu-architecture=sm_90"
    assert nvrtc.options(nvrtc.Architecture(90, ptx=True))[0] == "--gpu-architecture=compute_90"


def test_a_kernel_is_loaded_once_a_device_in_its_context(fake):
    cupy = fake()
    for device in (0, 1, 0, 1):
        start(cupy, device)
    assert [device for _, _, device in cupy.loaded] == [0, 1]
    assert [launched.device for launched in cupy.launches] == [0, 1, 0, 1]
    assert cupy.current is None
    first = cupy.launches[0]
    assert (first.symbol, first.grid, first.block) == ("_Zrelu_forward<float>", (2, 1, 1), (256, 1, 1))
    assert first.args == [80, 70, 0, 4]
    assert (first.shared_bytes, first.cooperative) == (0, False)


def test_cooperative_launches_are_told_to_both(fake):
    cupy = fake()
    start(cupy, cooperative=True)
    assert cupy.loaded[0][1]
    assert cupy.launches[0].cooperative


def test_shared_memory_beyond_the_default_is_asked_for(fake):
    cupy = fake()
    for amount in (1024, 100_000, 60_000, 100_000):
        start(cupy, shared_bytes=amount)
    assert [launched.limit for launched in cupy.launches] == [SHARED_BY_DEFAULT, 100_000, 100_000, 100_000]
    assert [launched.carve_out for launched in cupy.launches] == [-1, 100, 100, 100]


def test_static_and_dynamic_shared_memory_share_the_default(fake):
    cupy = fake()
    for amount in (SHARED_BY_DEFAULT - STATIC_SHARED, SHARED_BY_DEFAULT - STATIC_SHARED + 16):
        start(cupy, shared_bytes=amount)
    assert [launched.carve_out for launched in cupy.launches] == [-1, 100]
    assert cupy.launches[1].limit == SHARED_BY_DEFAULT - STATIC_SHARED + 16


def test_arguments_of_a_call_are_packed_anew(fake):
    cupy = fake()
    begin = gpu.bound_launches([launch_of()], 2, 0)
    for x, y in ((2**63 + 1, 3), (5, 2**64 - 1)):
        begin(None, [y, x], None)
    assert [launched.args for launched in cupy.launches] == [[2**63 + 1, 3, 0, 4], [5, 2**64 - 1, 0, 4]]
    assert all(address % 8 == 0 for launched in cupy.launches for address in launched.addresses)


def test_memory_comes_first_so_that_launches_follow_one_another():
    first, second, third = (launch_of(shared_bytes) for shared_bytes in (1, 2, 3))
    memory = Allocate(4, (2, 8), np.dtype(np.float32))
    copied = Compute(6, np.copy, (0,))
    of_memory, of_copied = (Views((of + 1,), of, (8,), ((8,),), memory.dtype) for of in (memory.slot, copied.slot))
    steps = [first, copied, of_copied, second, memory, of_memory, third]
    groups = []
    bound = gpu.bound_steps(SimpleNamespace(steps=steps), lambda group: (groups.append(group), group)[1])
    assert groups == [[memory], [of_memory], [first], [copied], [of_copied], [second, third]]
    assert bound == [one for group in groups for one in group]


def test_launches_of_one_buffer(fake):
    cupy = fake()
    gpu.bound_launches([launch_of(), launch_of(shared_bytes=5)], 2, 0)(None, [3, 7], None)
    assert [(one.args, one.shared_bytes) for one in cupy.launches] == [([7, 3, 0, 4], 0), ([7, 3, 0, 4], 5)]
    x, y = cupy.launches
    assert x.addresses[:2] == y.addresses[:2]


def test_structs_and_null_pointers_are_packed_once(fake):
    cupy = fake()
    kernel = next(one for one in all_kernels() if one.name == "max_pool_forward<float, 1, int>")
    window = np.zeros((), kernel.parameters[-1].dtype)
    window["kernel"], window["images"] = (3, 4, 5), 6
    step = Launch(kernel, (1, 1, 1), (256, 1, 1), (Slot(0), Slot(1), Slot(2), None, window), 0, False)
    gpu.bound_launches([step], 3, 0)(None, [7, 8, 9], None)
    launched = cupy.launches[0]
    assert launched.args[:4] == [7, 8, 9, 0]
    assert launched.addresses[4] % 16 == 0
    assert ctypes.string_at(launched.addresses[4], window.nbytes) == window.tobytes()


@pytest.mark.parametrize("error", gpu._REFUSALS)
def test_a_refused_cooperative_launch_is_said_and_remembered(fake, error):
    cupy = fake()
    cupy.refuses = f"{error}: what the driver says"
    with pytest.raises(CooperativeLaunchRefusedError, match=r"relu_forward<float>"):
        start(cupy, cooperative=True)
    assert gpu.is_refused(RELU, 0)
    assert not gpu.is_refused(RELU, 1)


@pytest.mark.parametrize("cooperative", [False, True])
def test_a_thread_that_has_not_called_cuda_gets_the_context(fake, cooperative):
    """Autograd's thread has not, until PyTorch's allocator asks for memory there."""
    cupy = fake()
    begin = gpu.bound_launches([launch_of(cooperative=cooperative)], 2, 0)
    with ThreadPoolExecutor(1) as pool:
        for slots in ([3, 4], [5, 6]):
            pool.submit(begin, None, slots, None).result()
    assert [launched.args for launched in cupy.launches] == [[4, 3, 0, 4], [6, 5, 0, 4]]


def test_other_errors_of_the_driver_stay_what_they_are(fake):
    cupy = fake()
    cupy.refuses = "CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered"
    with pytest.raises(CUDADriverError, match="ILLEGAL_ADDRESS"):
        start(cupy, cooperative=True)
    assert not gpu.is_refused(RELU, 0)


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
    start(cupy, cooperative=cooperative)
    assert [of for _, of, _ in cupy.loaded] == [cooperative]


def test_a_gpu_with_too_little_shared_memory_holds_none(fake):
    fake(capability="75", shared_optin=64 * 1024)
    assert gpu.resident_blocks_of_gpu(RELU, 256, 64 * 1024 - STATIC_SHARED, 0, True) > 0
    assert gpu.resident_blocks_of_gpu(RELU, 256, 64 * 1024, 0, True) == 0


@pytest.mark.parametrize("error", ["CUDA_ERROR_INVALID_PTX: x", "CUDA_ERROR_UNSUPPORTED_PTX_VERSION: x"])
def test_of_a_kernel_that_the_driver_cannot_load_there_are_none(fake, monkeypatch, error):
    def load(*_):
        raise CUDADriverError(error)

    fake()
    monkeypatch.setattr(gpu, "_raw_kernel", load)
    assert gpu.resident_blocks_of_gpu(RELU, 256, 0, 0, True) == 0


def test_a_driver_that_does_not_know_all_instructions_gets_older_ones(fake, monkeypatch):
    fake()
    asked, load = [], gpu._loaded

    def refuse_the_newest(kernel, architecture, cooperative):
        asked.append(architecture)
        if len(asked) == 1:
            raise CUDADriverError("CUDA_ERROR_INVALID_PTX: x")
        return load(kernel, architecture, cooperative)

    monkeypatch.setattr(gpu, "_loaded", refuse_the_newest)
    assert gpu.resident_blocks_of_gpu(RELU, 256, 0, 0, True) == 8 * 132
    assert [(one.capability, one.ptx) for one in asked] == [(90, False), (75, True)]


def test_other_errors_of_loading_stay_what_they_are(fake, monkeypatch):
    def load(*_):
        raise CUDADriverError("CUDA_ERROR_OUT_OF_MEMORY: x")

    fake()
    monkeypatch.setattr(gpu, "_raw_kernel", load)
    with pytest.raises(CUDADriverError, match="OUT_OF_MEMORY"):
        gpu.resident_blocks_of_gpu(RELU, 256, 0, 0, True)


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
