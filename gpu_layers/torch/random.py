"""Where the numbers of a dropout call come from: torch's generator, or a :class:`gpu_layers.Generator`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_all_functorch_interpreters
from torch.compiler import is_compiling, is_dynamo_compiling

from gpu_layers.core.cuda import import_cupy
from gpu_layers.random import Generator
from gpu_layers.torch import arrays

_randint = torch.randint
_BELOW = 2**63 - 1
_LOW_64 = 2**64 - 1
# What makes the key another one than that of torch's own kernels: "gpu_lays" in ASCII.
_CUDA_KEY = 0x6770755F6C617973
# Numbers that torch's kernels draw in a thread, and so what its generator has to advance by, a multiple of 4.
_CUDA_STEP = 4
# Elements of a result that is allocated before a number is drawn.
_LARGE = 2**18
_backward_task = torch._C._current_graph_task_id
_hooks_of_saved = torch._C._autograd._top_saved_tensors_default_hooks
_transforms_active = torch._C._are_functorch_transforms_active
_Mode = torch._C._TorchDispatchModeKey
_function_mode = torch._C._is_torch_function_mode_enabled
_needed_cupy = cache(import_cupy)


class _Recording:
    """The draws of a checkpointed forward, in order, to be taken again when it is recomputed."""

    def __init__(self) -> None:
        self.draws: list[tuple[int, int]] = []
        self.next: int | None = None  # None while recording

    def replay(self) -> tuple[int, int]:
        assert self.next is not None
        if self.next >= len(self.draws):
            raise RuntimeError("the recomputed forward draws more masks than the first one did")
        self.next += 1
        return self.draws[self.next - 1]


_recordings: ContextVar[tuple[_Recording, ...]] = ContextVar("gpu_layers_recordings", default=())


def check_generator(generator: Any) -> None:
    """TypeError unless it is None or a :class:`gpu_layers.Generator`."""
    if not (generator is None or isinstance(generator, Generator)):
        raise TypeError(f"generator must be a gpu_layers.Generator, got {type(generator).__name__}")


def draw(x: torch.Tensor, generator: Generator | None, eager: bool, inplace: bool = False) -> tuple[Any, int]:
    """Seed and offset of a training forward over x: the one draw that it makes.

    Parameters
    ----------
    x : Tensor
    generator : gpu_layers.Generator, optional
    eager : bool
        :func:`gpu_layers.torch.registry.is_eager` of x.
    inplace : bool
        Whether the result needs no memory.

    Returns
    -------
    seed : tensor of int64, shape (), or int
        The tensor is the one that the backward saves, so that what is recomputed with other random numbers agrees
        with itself; without hooks of saved tensors, a CPU's is a number. On a GPU, unless a graph is made, it has
        shape (2,), holds the offset too, and lies on the host.
    offset : int

    Raises
    ------
    TypeError
        If the backend that is forced does not take the tensor.
    NotImplementedError
        For a DTensor.
    RuntimeError
        If there is no memory for a large result; for a generator in a graph that is compiled, traced or captured, under
        a vmap that is not to have the same random numbers for all, or in a recomputation that does not replay it.
    """
    # Where nothing can compute these raise, before anything is drawn: here, CuPy on a GPU, and, of plain tensors so
    # large that it takes no time beside the rest, the allocator.
    if eager:
        if arrays.place() is not None:
            arrays.here(x)
        if not inplace and x.numel() >= _LARGE:
            x.new_empty(x.shape)
    elif not is_compiling() and hasattr(x, "device_mesh"):
        raise NotImplementedError(
            "gpu_layers.torch has no sharding rules for DTensor inputs: pass the local tensors, or use torch's own "
            "layers (gpu_layers.torch.revert(model))"
        )
    if generator is None:
        if x.is_cpu:
            # Elsewhere a default device, which is a function mode, would decide where it lies.
            anywhere = eager and not _function_mode()
            seed = _randint(_BELOW, ()) if anywhere else _randint(_BELOW, (), device=x.device)
            # A number needs no saving, but hooks are to see what backward needs.
            return seed.item() if eager and _hooks_of_saved(True) is None else seed, 0
        if eager and x.is_cuda and not arrays.is_capturing(x):
            _needed_cupy()
            return _numbers_of_cuda(torch.cuda.default_generators[x.get_device()]), 0
        return _randint(0, _BELOW, (), device=x.device), 0
    if is_compiling() or arrays.is_capturing(x) or not (eager or _runs_as_it_is_read()):
        raise RuntimeError(
            "a gpu_layers.Generator cannot be advanced by a compiled or captured graph: leave generator=None, for "
            "torch's own"
        )
    if _transforms_active():
        _check_randomness()
    seed, offset = _numbers(generator)
    return _signed(seed), _signed(offset)


def _runs_as_it_is_read() -> bool:
    """Whether no tracer (jit.trace, make_fx, functorch's aot_function) makes a graph of what is called now."""
    return not (
        torch._C._get_tracing_state()
        or torch._C._get_dispatch_mode(_Mode.PROXY)
        or torch._C._get_dispatch_mode(_Mode.FUNCTIONAL)
        or torch._ops._get_dispatch_mode_pre_dispatch(_Mode.PROXY)
    )


def _check_randomness() -> None:
    """RuntimeError unless every vmap around is to have the same random numbers for all."""
    for transformation in retrieve_all_functorch_interpreters():
        if isinstance(transformation, VmapInterpreter) and transformation.randomness() != "same":
            raise RuntimeError(
                "vmap: a gpu_layers.Generator gives all samples the same mask: ask for that by the 'same' randomness "
                "flag on vmap, or leave generator=None, for torch's own"
            )


def _numbers_of_cuda(generator: torch.Generator) -> torch.Tensor:
    """Seed and offset of torch's generator of a GPU, which advances as by a kernel of torch."""
    offset = generator.get_offset()
    generator.set_offset(offset + _CUDA_STEP)
    numbers = _signed((generator.initial_seed() ^ _CUDA_KEY) & _LOW_64), _signed(offset)
    return torch.tensor(numbers, device="cpu")


def _numbers(generator: Generator) -> tuple[int, int]:
    recordings = _recordings.get()
    for recording in reversed(recordings):
        if recording.next is not None:
            numbers = recording.replay()
            break
    else:
        if _backward_task() != -1:
            raise RuntimeError(
                "a layer with a gpu_layers.Generator of its own is recomputed within a backward pass, where its masks "
                "would be other ones: use checkpoint(..., use_reentrant=False, "
                "context_fn=gpu_layers.torch.checkpoint_contexts)"
            )
        numbers = generator.seed, generator.next_offset()
    for recording in recordings:
        if recording.next is None:
            recording.draws.append(numbers)
    return numbers


def _signed(number: int) -> int:
    """The same 64 bits as torch's integers hold them."""
    return number - 2**64 if number >= 2**63 else number


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=checkpoint_contexts)``.

    With them the masks that layers drew from a :class:`gpu_layers.Generator` in the first forward are taken again when
    it is recomputed. Layers without one need nothing: torch keeps the state of its own generators.

    Returns
    -------
    forward, recomputation : context manager
    """
    recording = _Recording()
    return _active(recording, recomputing=False), _Again(recording)


@contextmanager
def _active(recording: _Recording, recomputing: bool) -> Iterator[None]:
    recording.next = 0 if recomputing else None
    token = _recordings.set((*_recordings.get(), recording))
    try:
        yield
    finally:
        _recordings.reset(token)


class _Again:
    """A context that can be entered once for every backward over the same checkpoint."""

    def __init__(self, recording: _Recording) -> None:
        self._recording = recording
        self._active: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._active.append(_active(self._recording, recomputing=True))
        self._active[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self._active.pop().__exit__(*error)


def is_recomputation() -> bool:
    """Whether this forward runs within a backward pass: checkpointing, or FSDP, computes something again."""
    return not is_dynamo_compiling() and _backward_task() != -1
