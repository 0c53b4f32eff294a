"""The seam between torch and the operations: one row an operation, two ways to call it.

1. Plain tensors, eagerly: an ``autograd.Function`` calls ``run`` at once; no dispatcher is asked.
2. ``torch.compile``, export, fake tensors, dispatch modes, subclasses, ``torch.func``: ``torch.ops.gpu_layers.<name>``,
   with a fake implementation, a backward of its own, and a loop for ``vmap``.

Both share ``run``, ``save`` and ``backward``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch._C import _functorch as _wrappers
from torch._functorch.pyfunctorch import (
    retrieve_all_functorch_interpreters,
    retrieve_current_functorch_interpreter,
    temporarily_clear_interpreter_stack,
)
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from gpu_layers.torch import arrays

_LIBRARY = torch.library.Library("gpu_layers", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
Tensor, Parameter = torch.Tensor, torch.nn.Parameter
_Transform = _wrappers.TransformType
_PLAIN = (Tensor, Parameter)
_OF_NUMBERS = (None,)  # their gradient

transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
# Of gradients that come batched, is_grads_batched=True; an operation of the dispatcher is called in a loop then.
_is_legacy_batched = _wrappers.is_legacy_batchedtensor
_function_mode = torch._C._is_torch_function_mode_enabled
_tracing_state = torch._C._get_tracing_state
_is_grad_enabled = torch.is_grad_enabled
_hooks_of_saved = torch._C._autograd._top_saved_tensors_default_hooks
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    save: Callable[[Any, tuple, Any], None] = lambda ctx, inputs, output: None,
    eager: Callable[..., Any] | None = None,
    *,
    pack: Callable[[tuple, tuple], Any] = lambda tensors, numbers: numbers,
    unpack: Callable[[Any], tuple] = lambda numbers: numbers,
    with_tensors: Callable[[tuple], tuple] | None = None,
    first: Callable[[tuple, tuple], Any] | None = None,
    raw: Any = None,
) -> Any:
    """Register an operation, and get the function that calls it.

    All functions take the tensors, with which a schema begins, and then the numbers after them as one object: autograd
    takes its time for each argument.

    Parameters
    ----------
    schema : str
        As torch's: ``name(Tensor x, ...) -> Tensor``.
    run : callable
        Computes with plain tensors; makes no graph.
    fake : callable
        Shapes, dtypes and strides of the results, from those of the arguments.
    backward : callable, optional
        ``backward(ctx, *gradients)``: the gradients of all tensors. ``ctx.numbers`` is the object of the numbers. Built
        of torch's operations and of calls to other rows where it can be asked for its own gradient
        (``torch.is_grad_enabled()``).
    save : callable, optional
        ``save(ctx, inputs, output)``: saves the tensors that backward needs.
    eager : callable, optional
        Used in place of run where no gradient is needed; may give None for a result that was not requested.
    pack, unpack : callable, optional
        ``pack(tensors, numbers)`` makes the object of the numbers that the schema has; ``unpack`` gives them back.
    with_tensors : callable, optional
        Puts tensors in the place of what is a number where plain tensors are computed with at once.
    first : callable, optional
        ``first(results, args)`` gives the first result, which alone has a gradient then; the others are what the
        backward needs. ``call.first`` gives it too, and spares plain tensors the others: theirs is that of ``raw``.
    raw : callable, with first
        As run, with what only the backward needs as the floor gave it, for :func:`keep`.

    Returns
    -------
    callable
        ``call(*tensors, numbers)``, and ``call.eagerly``, the same where :func:`is_eager` has been asked.
    """
    name = schema.partition("(")[0]
    qualified = f"gpu_layers::{name}"
    _LIBRARY.define(schema, tags=_TAGS)
    overload = getattr(torch.ops.gpu_layers, name).default
    arguments = overload._schema.arguments
    count = sum("Tensor" in str(argument.type) for argument in arguments)

    def packed(args: tuple) -> tuple:
        tensors = args[:count]
        return *tensors, pack(tensors, args[count:])

    def flat(args: tuple) -> tuple:
        if with_tensors is not None:
            args = with_tensors(args)
        return *args[:count], *unpack(args[count])

    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, lambda *args: run(*packed(tuple(map(_plain, args)))), key)
    torch.library.register_fake(qualified, lambda *args: fake(*packed(args)), lib=_LIBRARY)
    # Within this rule torch.func is still on its way down to the operation: only the dispatcher leads on.
    written = [place for place, one in enumerate(arguments) if one.alias_info is not None and one.alias_info.is_write]
    torch.library.register_vmap(qualified, _loop(overload, written), lib=_LIBRARY)
    if backward is None:
        return _without_gradient(overload, run, flat, written)

    place_of_call = arrays.place

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        args = packed(inputs)
        ctx.place, ctx.numbers = place_of_call(), args[count]
        save(ctx, args, output)
        if first is not None:
            _only_first_has_gradient(ctx, output)

    def backward_of_call(ctx: Any, *gradients: Any) -> tuple:
        if ctx.place is place_of_call():
            return backward(ctx, *gradients) + _OF_NUMBERS
        with arrays.at(ctx.place):
            return backward(ctx, *gradients) + _OF_NUMBERS

    def backward_of_schema(ctx: Any, *gradients: Any) -> tuple:
        return backward_of_call(ctx, *gradients)[:count] + (None,) * (len(arguments) - count)

    kernel = _autograd_kernel(name, overload, setup_context, backward_of_schema)
    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)

    def forward(ctx: Any, *args: Any) -> Any:
        output = run(*args)
        ctx.place, ctx.numbers = place_of_call(), args[count]
        save(ctx, args, output)
        if first is not None:
            _only_first_has_gradient(ctx, output)
        return output

    def forward_first(ctx: Any, *args: Any) -> Any:
        output = raw(*args)
        ctx.place, ctx.numbers = place_of_call(), args[count]
        save(ctx, args, output)
        return output[0]

    def caller(forward: Callable[..., Any], at_once: Callable[..., Any], part: Callable[[Any, tuple], Any]) -> Any:
        function: Any = _function(name, forward=forward, backward=backward_of_call)
        # Function.apply without the part that is there for torch.func, which does not come here.
        apply = super(torch.autograd.Function, function).apply
        # What the engine calls, without the look for the backward that a Function has.
        function._backward_cls.apply = backward_of_call

        def call(*args: Any) -> Any:
            if is_eager(args[0], *args[1:count]) and not _is_legacy_batched(args[0]):
                return eagerly(*args)
            return part(overload(*flat(args)), args)

        def eagerly(*args: Any) -> Any:
            if forward_ad._current_level >= 0:
                refuse_tangents(name, args)
            if _is_grad_enabled():
                for arg in args:
                    if type(arg) in _PLAIN and arg.requires_grad:
                        return apply(*args)
            return at_once(*args)

        call.__name__ = name
        call.eagerly = eagerly  # type: ignore[attr-defined]
        return call

    at_once = eager or run
    call: Any = caller(forward, at_once, _whole)
    if first is not None:
        call.first = caller(forward_first, lambda *args: raw(*args)[0], first)
    return call


def _functionalizes() -> bool:
    """Whether ``torch.func.functionalize`` is among the transformations."""
    return any(one.key() == _Transform.Functionalize for one in retrieve_all_functorch_interpreters())


def _functionalized(overload: Any, written: Sequence[int], args: Sequence[Any]) -> None:
    """Call an operation that writes, which ``torch.func.functionalize`` refuses.

    To what that wraps it writes by a copy, and by an operation of torch's.
    """
    transformation = retrieve_current_functorch_interpreter()
    kind, level = transformation.key(), transformation.level()
    if kind == _Transform.Vmap:
        return overload(*args)
    within, copied = list(args), []
    for place, arg in enumerate(args):
        if isinstance(arg, Tensor) and _wrappers.maybe_get_level(arg) == level:
            if kind == _Transform.Functionalize:
                torch._sync(arg)
                copied += [place] * (place in written)
            within[place] = _wrappers.get_unwrapped(arg)
    with transformation.lower():
        if kind != _Transform.Functionalize:
            return _functionalized(overload, written, within)
        for place in copied:
            within[place] = within[place].clone()
        overload(*within)
    for place in copied:
        args[place].copy_(within[place])
    return None


@contextmanager
def beneath(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor within the wrappers of ``torch.func``, while no transformation of that is active."""
    with temporarily_clear_interpreter_stack():
        while _wrappers.is_functorch_wrapped_tensor(x):
            if _wrappers.is_functionaltensor(x):
                torch._sync(x)
            x = _wrappers.get_unwrapped(x)
        yield x


def _plain(arg: Any) -> Any:
    """A tensor that programs of kernels know, of a subclass's."""
    return arg.as_subclass(Tensor) if isinstance(arg, Tensor) and type(arg) not in _PLAIN else arg


def _whole(results: Any, args: tuple) -> Any:
    return results


def first_result(results: tuple, args: tuple) -> Any:
    """``first`` of :func:`define`, where nothing is left to do."""
    return results[0]


def _only_first_has_gradient(ctx: Any, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def is_eager(x: torch.Tensor, *others: Any) -> bool:
    """Whether an operation on these would compute at once, with plain tensors."""
    if is_dynamo_compiling() or transforms_active() or _dispatch_modes() or _tracing_state():
        return False
    if _function_mode() and not _only_default_devices():
        return False
    if others:
        for one in others:
            if isinstance(one, Tensor) and type(one) not in _PLAIN:
                return False
    return type(x) in _PLAIN and (x.is_cpu or x.is_cuda)


def _only_default_devices() -> bool:
    """Whether the function modes say only where new tensors lie: for operations here, beside their inputs."""
    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def is_plain(dy: torch.Tensor) -> bool:
    """Whether a backward can compute at once, with dy and what it saved: nobody asks for its gradient, or tangent."""
    return not _is_grad_enabled() and forward_ad._current_level < 0 and is_eager(dy) and not _is_legacy_batched(dy)


def keep(ctx: Any, *tensors: torch.Tensor | None, last: Any, channels_last: bool = False) -> None:
    """Save tensors, and last what may be an array that nobody else has.

    That is a tensor where hooks look at what is saved. Otherwise it is spared that, but lives no longer: :func:`kept`.
    """
    ctx.kept = None
    if isinstance(last, np.ndarray):
        if _hooks_of_saved(True) is None:
            ctx.kept = last
            if tensors:
                ctx.save_for_backward(*tensors)
            return
        last = arrays.tensor_of(last, channels_last)
    ctx.save_for_backward(*tensors, last)


def kept(ctx: Any) -> tuple:
    """What :func:`keep` got, in a backward; an array is let go with the graph's tensors."""
    saved, last = ctx.saved_tensors, ctx.kept
    if last is None:
        return saved
    if not _keeps_graph():
        ctx.kept = None
    return (*saved, last)


def _autograd_kernel(name: str, overload: Any, setup: Any, backward: Any) -> Callable[..., Any]:
    """What the dispatcher calls where gradients may be needed.

    Not ``torch.library.register_autograd``, whose kernel drops the tangents of forward mode without a word.
    """

    def below(keyset: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx: Any, *args: Any) -> Any:
        inputs, keyset = args[:-1], args[-1]
        if transforms_active():
            # A Function's forward switches gradients off, of transformations around this one too.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                output = below(keyset, *inputs)
        else:
            output = below(keyset, *inputs)
        setup(ctx, inputs, output)
        return output

    def backward_of_args(ctx: Any, *gradients: Any) -> tuple:
        return (*backward(_Unwrapped(ctx), *gradients), None)

    function: Any = _function(name, forward=forward, backward=backward_of_args)
    # Function.apply refuses what has no setup_context under torch.func; but this kernel is called for one level of it,
    # whose tensors are like any others here.
    apply = super(torch.autograd.Function, function).apply

    def kernel(keyset: Any, *args: Any) -> Any:
        if torch._C._is_fwd_grad_enabled():
            # Of the transformation, if any, that calls this: the others call it themselves.
            refuse_tangents(name, args, _has_own_tangent)
        if _is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
            if transforms_active():
                with enable_single_level_autograd_function():
                    return apply(*args, keyset)
            return apply(*args, keyset)
        return below(keyset, *args)

    return kernel


def _function(name: str, **methods: Any) -> type:
    title = "".join(part.capitalize() for part in name.split("_"))
    return type(title, (torch.autograd.Function,), {key: staticmethod(value) for key, value in methods.items()})


def _without_gradient(
    overload: Any, run: Callable[..., Any], flat: Callable[[tuple], tuple], written: Sequence[int]
) -> Callable[..., Any]:
    """The call of an operation whose results have no gradient."""

    def call(*args: Any) -> Any:
        if is_eager(*args):
            return run(*args)
        if written and not is_dynamo_compiling() and transforms_active() and _functionalizes():
            return _functionalized(overload, written, flat(args))
        return overload(*flat(args))

    return call


class _Unwrapped:
    """A context of a backward, which may be asked for after its transformation is over, as ``torch.func.vjp``'s is.

    What is saved is in wrappers then, which have no memory.
    """

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    @property
    def saved_tensors(self) -> tuple:
        return tuple([None if one is None else _wrappers.unwrap_if_dead(one) for one in self._ctx.saved_tensors])


def _loop(call: Callable[..., Any], written: Sequence[int] = ()) -> Callable[..., Any]:
    """A rule for ``vmap``: one call an index of the mapped axis, results stacked on axis 0.

    ``written``: places of the arguments that the call changes.
    """

    def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
        for place in written:
            if args[place] is not None and in_dims[place] is None:
                raise RuntimeError(
                    "Batch norm got a batched tensor as input while the running_mean or running_var, which will be "
                    "updated in place, were not batched: under vmap set track_running_stats=False, or evaluate"
                )

        def at(index: int) -> list:
            return [
                arg if dim is None or not isinstance(arg, torch.Tensor) else sample(arg, dim, index)
                for arg, dim in zip(args, in_dims, strict=True)
            ]

        def sample(arg: torch.Tensor, dim: int, index: int) -> torch.Tensor:
            # Of none, one is made up that tells the results' shapes.
            return arg.select(dim, index) if info.batch_size else arg.sum(dim, dtype=arg.dtype)

        def stacked(parts: Any) -> torch.Tensor:
            return torch.stack(parts)[: info.batch_size]

        results = [call(*at(index)) for index in range(info.batch_size or 1)]
        if results[0] is None:
            return None, None
        if isinstance(results[0], tuple):
            return tuple(stacked(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])
        return stacked(results), 0

    return vmap


def _has_own_tangent(x: torch.Tensor) -> bool:
    # Of level 0, the only one that there is: within a compiled graph nothing tells which is current.
    return torch._VF._unpack_dual(x, level=0)[1] is not None


def _has_tangent(x: torch.Tensor) -> bool:
    if not (transforms_active() and _wrappers.is_functorch_wrapped_tensor(x)):
        return _has_own_tangent(x)
    # Under torch.func: of this transformation's tensor, which vmap has no rule for, or of one within.
    if not _wrappers.is_batchedtensor(x) and _has_own_tangent(x):
        return True
    transformation = retrieve_current_functorch_interpreter()
    with transformation.lower():
        outermost = _wrappers.maybe_get_level(x) == transformation.level()
        return _has_tangent(_wrappers.get_unwrapped(x) if outermost else x)


def refuse_tangents(name: str, args: tuple, has_tangent: Callable[[torch.Tensor], bool] = _has_tangent) -> None:
    """RuntimeError if one of these is a dual tensor."""
    for arg in args:
        if isinstance(arg, torch.Tensor) and has_tangent(arg):
            raise RuntimeError(
                f"gpu_layers::{name} has no forward-mode derivative: use reverse mode, or torch's own layers "
                "(gpu_layers.torch.revert(model))"
            )


def through(composite: Callable[..., Any], inputs: tuple, needed: tuple[bool, ...], gradients: tuple) -> list:
    """Gradients of a function built of differentiable operations: the backward of a backward.

    Parameters
    ----------
    composite : callable
        Takes the inputs, gives a tuple of tensors or None.
    inputs : tuple of tensor or None
    needed : tuple of bool
        Which inputs' gradients are asked for.
    gradients : tuple of tensor or None
        One a result.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        if not again:
            inputs = tuple(
                one.detach().requires_grad_(wanted) if isinstance(one, torch.Tensor) else one
                for one, wanted in zip(inputs, needed, strict=True)
            )
        results = composite(*inputs)
        pairs = [
            (result, gradient)
            for result, gradient in zip(results, gradients, strict=True)
            if gradient is not None and isinstance(result, torch.Tensor) and result.requires_grad
        ]
        wanted = [one for one, need in zip(inputs, needed, strict=True) if need]
        if not pairs or not wanted:
            return [None] * len(inputs)
        found = iter(
            torch.autograd.grad(
                [result for result, _ in pairs],
                wanted,
                [gradient for _, gradient in pairs],
                create_graph=again,
                allow_unused=True,
            )
        )
    return [next(found) if need else None for need in needed]
