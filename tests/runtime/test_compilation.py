"""Every kernel compiles, for every architecture some of each template, and takes what its launcher passes: no GPU."""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

import gpu_layers.kernels  # noqa: F401 - declares the kernels
from gpu_layers.core import headers
from gpu_layers.runtime import nvrtc
from gpu_layers.runtime.kernel import C_TYPES, Kernel, all_kernels
from gpu_layers.runtime.nvrtc import Architecture, compile_source
from gpu_layers.runtime.sources import source_folder
from tests.compiled_names import GATED, WHOLE, compiled, names_of

# The oldest and the newest, for which one kernel of each template stands for all, of bfloat16 where there is one: the
# type that headers treat differently from architecture to architecture.
OTHERS = (75, 120)
SOURCES = sorted({kernel.source for kernel in all_kernels()})


def names(source, capability):
    if capability in GATED:
        return names_of(source, capability)
    last_of = sorted(all_kernels(), key=lambda kernel: "<__nv_bfloat16" in kernel.name)
    return tuple({template(kernel.name): kernel.name for kernel in last_of if kernel.source == source}.values())


def template(name):
    return name.split("<")[0]


def compiled_for(source, capability):
    return compiled(source, names(source, capability), capability)


@pytest.fixture(scope="module")
def symbols():
    """Mangled symbol of every kernel, by architecture; every pair of file and architecture compiled once."""
    jobs = [(source, capability) for capability in GATED + OTHERS for source in SOURCES]
    found = {capability: {} for capability in GATED + OTHERS}
    # Processes of their own: NVRTC compiles one program at a time in each.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for (_, capability), module in zip(jobs, pool.map(compiled_for, *zip(*jobs, strict=True)), strict=True):
            assert module.path.read_bytes()[:4] == b"\x7fELF"
            found[capability].update(module.symbols)
    return found


@pytest.mark.parametrize("capability", GATED)
def test_every_kernel_compiles_without_warnings(symbols, capability):
    assert symbols[capability].keys() == {name for source in SOURCES for name in names_of(source, capability)}
    assert capability != WHOLE or symbols[capability].keys() == {kernel.name for kernel in all_kernels()}


@pytest.mark.parametrize("capability", OTHERS)
def test_every_template_compiles_without_warnings(symbols, capability):
    assert symbols[capability].keys() == {name for source in SOURCES for name in names(source, capability)}
    assert {template(name) for name in symbols[capability]} == {template(kernel.name) for kernel in all_kernels()}


def demangled(mangled):
    tool = shutil.which("c++filt")
    assert tool, "c++filt, of the package binutils that g++ brings, is missing"
    return subprocess.run([tool], input="\n".join(mangled), text=True, capture_output=True, check=True).stdout.split(
        "\n"
    )


def canonical(c_type: str) -> str:
    """The spelling of c++filt, which puts const last and knows 64-bit integers by one name."""
    c_type = c_type.strip()
    const = c_type.startswith("const ")
    base = c_type.removeprefix("const ").rstrip("*")
    return f"{base}{' const' if const else ''}{'*' if c_type.endswith('*') else ''}"


def split_parameters(text: str) -> list[str]:
    """Split at the commas that are not within angle brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def test_entry_points_take_what_the_launchers_pass(symbols):
    kernels = all_kernels()
    for kernel, signature in zip(kernels, demangled([symbols[90][kernel.name] for kernel in kernels]), strict=True):
        # void f<float, (Kind)4>(float const*, long long): what is in the last parentheses.
        found = re.search(r">\((.*)\)$", signature)
        assert found, signature
        # accumulate_t<float> stands unresolved in a template's symbol.
        taken = [
            re.sub(r"Accumulate<([^<>]*)>::type", lambda m: "double" if m[1] == "double" else "float", part)
            for part in split_parameters(found[1])
        ]
        declared = [canonical(parameter.c_type) for parameter in kernel.parameters]
        assert taken == declared, f"{kernel}: {signature}"


def test_struct_layouts_are_those_of_the_sources():
    """The sizes that the launchers pass are asserted where the structs are."""
    sources = "\n".join(path.read_text() for path in source_folder().glob("*.cu*"))
    structs = {
        parameter.c_type: parameter.dtype.itemsize
        for kernel in all_kernels()
        for parameter in kernel.parameters
        if parameter.c_type not in C_TYPES and not parameter.is_pointer
    }
    assert structs
    for c_type, size in structs.items():
        if "<" not in c_type:
            assert f"static_assert(sizeof({c_type}) == {size}" in sources, c_type


def test_ptx_for_gpus_newer_than_the_compiler():
    kernel = next(kernel for kernel in all_kernels() if kernel.source == "dropout.cu")
    code, symbols = compile_source(kernel.source, [kernel.name], Architecture(90, ptx=True))
    assert symbols[kernel.name] in code.decode()
    assert ".target sm_90" in code.decode()


def test_code_is_kept_by_all_that_it_depends_on(monkeypatch, tmp_path):
    """Each of these alone makes other code, which must not be taken for what lies in the cache."""

    def files(source="dropout.cu", names=("f<float>",), capability=90, ptx=False, warnings_as_errors=False):
        return nvrtc._files(source, names, Architecture(capability, ptx=ptx), warnings_as_errors)

    def by(version):
        return lambda: SimpleNamespace(getVersion=lambda: version)

    monkeypatch.setenv("GPU_LAYERS_CACHE_DIR", str(tmp_path))
    # The same headers whatever the version, so that it is the version itself that counts.
    monkeypatch.setattr(nvrtc, "cuda_header_folders", lambda version: [tmp_path])
    monkeypatch.setattr(nvrtc, "nvrtc", by((13, 0)))
    found = [
        files(),
        files(source="max_pool.cu"),
        files(names=("f<double>",)),
        files(names=("f<float>", "f<double>")),
        files(capability=80),
        files(ptx=True),
        files(warnings_as_errors=True),
    ]
    assert files() == found[0]
    usual = nvrtc.options(Architecture(90))
    for name, other in (
        ("nvrtc", by((13, 1))),
        ("nvrtc", by((12, 0))),
        ("sources_digest", lambda: "other sources"),
        ("cuda_header_folders", lambda version: [tmp_path / "other"]),
        ("options", lambda architecture: [*usual, "-lineinfo"]),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(nvrtc, name, other)
            found.append(files())
    for paths in zip(*found, strict=True):
        assert len(set(paths)) == len(found)


def test_a_warning_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "warns.cu").write_text(
        "template <typename T> __global__ void warns(T* x) { int unused_number = 3; x[0] = T(1); }\n"
    )
    monkeypatch.setattr("gpu_layers.runtime.nvrtc.source_folder", lambda: tmp_path)
    with pytest.raises(RuntimeError, match=r"warns\.cu.*unused_number"):
        compile_source("warns.cu", ["warns<float>"], Architecture(90), warnings_as_errors=True)


def test_a_compile_error_names_file_and_line(tmp_path, monkeypatch):
    (tmp_path / "broken.cu").write_text("__global__ void broken() {\n    missing();\n}\n")
    monkeypatch.setattr("gpu_layers.runtime.nvrtc.source_folder", lambda: tmp_path)
    with pytest.raises(RuntimeError, match=r"broken\.cu\(2\): error"):
        compile_source("broken.cu", ["broken"], Architecture(90))


def test_kernels_are_declared_once():
    kernels: list[Kernel] = all_kernels()
    assert len({(kernel.source, kernel.name) for kernel in kernels}) == len(kernels)


# Compiles one kernel of every file by NVRTC of the major version of CUDA that is asked for, whatever CuPy's is: opened
# before CuPy looks, it is taken.
BY_ANOTHER = """
import json, sys
import gpu_layers.kernels
from gpu_layers.core import headers
from gpu_layers.runtime import nvrtc
from gpu_layers.runtime.kernel import all_kernels
nvrtc._open_library(int(sys.argv[1]))
nvrtc._open_library = lambda cuda: None
version = nvrtc.nvrtc().getVersion()
# One kernel of each function: with fewer, the compiler warns of constants that are not used.
last_of = sorted(all_kernels(), key=lambda kernel: "<__nv_bfloat16" in kernel.name)
kernels = {(kernel.source, kernel.name.split("<")[0]): kernel for kernel in last_of}
found = {}
for source in {source for source, _ in kernels}:
    names = [kernel.name for kernel in kernels.values() if kernel.source == source]
    for capability in map(int, sys.argv[2:]):
        code, _ = nvrtc.compile_source(source, names, nvrtc.Architecture(capability), warnings_as_errors=True)
        found[f"{source} {capability}"] = code[:4].decode("latin1")
print(json.dumps([version, headers.version_of_headers(headers.cuda_header_folders(version)[0]), found]))
"""


def has_wheel(cuda):
    return any(Path(folder, nvrtc._WHEEL_LIBRARIES[cuda]).is_file() for folder in sys.path)


def in_a_process_of_its_own(program, *arguments):
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_kernel_of_every_function_compiles_with_the_other_version_of_cuda_too():
    cuda = {12: 13, 13: 12}[nvrtc.nvrtc().getVersion()[0]]
    if not has_wheel(cuda):
        pytest.skip(f"NVRTC of CUDA {cuda} is not installed as a wheel")
    capabilities = (90,)
    version, of_headers, found = in_a_process_of_its_own(BY_ANOTHER, cuda, *capabilities)
    assert version[0] == of_headers[0] == cuda
    assert found == {f"{source} {capability}": "\x7fELF" for source in SOURCES for capability in capabilities}


def test_the_compiler_is_of_cupys_own_cuda_version():
    cuda = pytest.importorskip("cupy").cuda.runtime.runtimeGetVersion() // 1000
    if not has_wheel(cuda):
        pytest.skip("NVRTC is not installed as a wheel")
    program = "import json; from gpu_layers.runtime.nvrtc import nvrtc; print(json.dumps(nvrtc().getVersion()))"
    assert in_a_process_of_its_own(program)[0] == cuda


def test_a_library_of_cupys_version_is_opened_before_cupy_looks(monkeypatch, tmp_path):
    opened = []

    def refuse(path):
        opened.append(path)
        raise OSError("wrong ELF class")

    for name in nvrtc._WHEEL_LIBRARIES.values():
        folder = (tmp_path / name).parent
        folder.mkdir(parents=True)
        (tmp_path / name).touch()
        # NVRTC of CUDA 13.0 finds its own only if it is open.
        for version in ("12.9", "13.0"):
            for kind in ("", ".alt"):
                (folder / f"libnvrtc-builtins{kind}.so.{version}").touch()
    monkeypatch.setattr("sys.path", [str(tmp_path / "nothing"), str(tmp_path), str(tmp_path)])
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", refuse)
    module = object()
    for version, libraries in (
        (12090, ["libnvrtc-builtins.so.12.9", "libnvrtc.so.12"]),
        (13000, ["libnvrtc-builtins.so.13.0", "libnvrtc.so.13"]),
        (14000, []),
    ):
        opened.clear()
        nvrtc._open_library.cache_clear()
        runtime = SimpleNamespace(runtimeGetVersion=lambda: version)  # noqa: B023
        monkeypatch.setattr(
            nvrtc,
            "import_cupy",
            lambda: SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, nvrtc=module)),  # noqa: B023
        )
        assert nvrtc.nvrtc() is module
        assert nvrtc.nvrtc() is module
        assert [Path(path).name for path in opened] == libraries
    nvrtc._open_library.cache_clear()


@pytest.mark.parametrize(
    ("version", "expected", "target"),
    [
        (None, "packages/nvidia/cu13/include", "packages/nvidia/cu13/include/cccl"),
        ((13, 0), "packages/nvidia/cu13/include", "packages/nvidia/cu13/include/cccl"),
        ((12, 9), "packages/nvidia/cuda_runtime/include", "packages/nvidia/cuda_cccl/include"),
        ((12, 4), "toolkit/include", "packages/nvidia/cuda_cccl/include"),  # the very version
        ((11, 8), "packages/nvidia/cu13/include", "packages/nvidia/cu13/include/cccl"),  # better than none
    ],
)
def test_headers_fit_the_compiler(monkeypatch, tmp_path, version, expected, target):
    folders = {
        "packages/nvidia/cu13/include": 13050,
        "packages/nvidia/cuda_runtime/include": 12080,
        "toolkit/include": 12040,
    }
    for folder, number in folders.items():
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "cuda_fp16.h").touch()
        (tmp_path / folder / "cuda_runtime_api.h").write_text(f"#define  CUDART_VERSION  {number}\n")
    for folder in ("packages/nvidia/cu13/include/cccl/nv", "packages/nvidia/cuda_cccl/include/nv"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "target").touch()
    monkeypatch.setattr(headers, "_toolkits", lambda: [tmp_path / "toolkit"])
    monkeypatch.setattr("sys.path", [str(tmp_path / "packages")])
    assert headers.cuda_header_folders(version) == [tmp_path / expected, tmp_path / target]
    assert headers.version_of_headers(tmp_path / expected) == (
        folders[expected] // 1000,
        folders[expected] % 1000 // 10,
    )


def test_headers_of_a_version_that_is_not_said_are_taken_where_there_are_no_others(tmp_path, monkeypatch):
    (tmp_path / "nvidia/cu13/include").mkdir(parents=True)
    (tmp_path / "nvidia/cu13/include/cuda_fp16.h").touch()
    monkeypatch.setattr(headers, "_toolkits", list)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert headers.version_of_headers(tmp_path / "nvidia/cu13/include") is None
    assert headers.cuda_header_folders((12, 9)) == [tmp_path / "nvidia/cu13/include"]
