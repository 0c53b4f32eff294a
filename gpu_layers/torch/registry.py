"""The seam between torch and the operations: one row an operation, three ways to call it.

1. Plain tensors, eagerly: an ``autograd.Function`` calls ``run`` at once; no dispatcher is asked.
2. ``torch.compile``, export, fake tensors, dispatch modes, subclasses: ``torch.ops.gpu_layers.<name>``, with a fake
   implementation and a backward of its own.
3. ``torch.func``: a Function with ``setup_context``, whose rule for ``vmap`` is a loop.

All three share ``run``, ``setup`` and ``backward``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from gpu_layers.torch import arrays

_LIBRARY = torch.library.Library("gpu_layers", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
Tensor, Parameter = torch.Tensor, torch.nn.Parameter
_PLAIN = (Tensor, Parameter)

_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_mode = torch._C._is_torch_function_mode_enabled
_tracing_state = torch._C._get_tracing_state
_is_grad_enabled = torch.is_grad_enabled


def _same(args: tuple) -> tuple:
    return args


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    eager: Callable[..., Any] | None = None,
    *,
    pack: Callable[[tuple], tuple] = _same,
    flat: Callable[[tuple], tuple] = _same,
    first: Callable[[tuple, tuple], Any] | None = None,
) -> Any:
    """Register an operation, and get the function that calls it.

    Parameters
    ----------
    schema : str
        As torch's: ``name(Tensor x, ...) -> Tensor``.
    run : callable
        Computes with plain tensors; makes no graph.
    fake : callable
        Shapes, dtypes and strides of the results, from those of the arguments.
    setup : callable
        ``setup(ctx, inputs, output)``: saves what backward needs.
    backward : callable
        ``backward(ctx, *gradients)``: the gradients of the first arguments, none for later ones. Built of torch's
        operations and of calls to other rows where it can be asked for its own gradient (``torch.is_grad_enabled()``).
    eager : callable, optional
        Used in place of run where no gradient is needed; may give None for a result that was not requested.
    pack, flat : callable, optional
        From the arguments that the schema has to those that all of the functions above take, tensors first, and back.
    first : callable, optional
        ``first(results, args)`` gives the first result, which alone has a gradient then; the others are what the
        backward needs. ``call.first`` gives it too, and spares plain tensors the others: theirs is that of ``run``.

    Returns
    -------
    callable
        ``call(*args)``; and ``call.in_backward(dy, *args)``, the same for the backward of another row, whose other
        tensors are as plain as dy: it looks at dy alone.
    """
    name = schema.partition("(")[0]
    qualified = f"gpu_layers::{name}"
    _LIBRARY.define(schema, tags=_TAGS)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, lambda *args: run(*pack(args)), key)
    torch.library.register_fake(qualified, lambda *args: fake(*pack(args)), lib=_LIBRARY)
    overload = getattr(torch.ops.gpu_layers, name).default
    if setup is None or backward is None:
        return _without_gradient(overload, run, pack, flat)

    place_of_call = arrays.place

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.place = arrays.place()
        setup(ctx, pack(inputs), output)
        if first is not None:
            _only_first_has_gradient(ctx, output)

    def gradients_there(ctx: Any, *gradients: Any) -> tuple:
        if ctx.place is place_of_call():
            return backward(ctx, *gradients)
        with arrays.at(ctx.place):
            return backward(ctx, *gradients)

    arguments = len(overload._schema.arguments)

    def backward_of_schema(ctx: Any, *gradients: Any) -> tuple:
        found = gradients_there(ctx, *gradients)
        return found + (None,) * (arguments - len(found))

    def call_flat(*args: Any) -> Any:
        return call(*pack(args))

    vmap = _loop(call_flat)
    torch.library.register_vmap(qualified, vmap, lib=_LIBRARY)
    transformed: list[Any] = []  # made when torch.func first asks

    def transform(*args: Any) -> Any:
        if not transformed:
            transformed.append(_transformable(name, overload, setup_context, backward_of_schema, vmap))
        return transformed[0].apply(*args)

    kernel = _autograd_kernel(name, overload, setup_context, backward_of_schema)
    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)

    of_call = run.__code__.co_argcount

    def forward(ctx: Any, *args: Any) -> Any:
        output = run(*args)
        ctx.place = place_of_call()
        setup(ctx, args, output)
        if first is not None:
            _only_first_has_gradient(ctx, output)
        return output

    def forward_first(ctx: Any, *args: Any) -> Any:
        output = run(*args)
        ctx.place = place_of_call()
        setup(ctx, args, output)
        return output[0]

    def backward_of_call(ctx: Any, *gradients: Any) -> tuple:
        if ctx.place is place_of_call():
            found = backward(ctx, *gradients)
        else:
            with arrays.at(ctx.place):
                found = backward(ctx, *gradients)
        return found + (None,) * (of_call - len(found))

    places = _places_of_tensors(overload)

    def caller(forward: Callable[..., Any], at_once: Callable[..., Any], part: Callable[[Any, tuple], Any]) -> Any:
        function: Any = _function(name, forward=forward, backward=backward_of_call)
        # Function.apply without the part that is there for torch.func, which does not come here.
        apply = super(torch.autograd.Function, function).apply
        # What the engine calls, without the look for the backward that a Function has.
        function._backward_cls.apply = backward_of_call

        def call(*args: Any) -> Any:
            if is_dynamo_compiling():
                return part(overload(*flat(args)), args)
            if _transforms_active():
                # While a graph is made of what torch.func transforms, the operation itself.
                through_func = overload if is_compiling() else transform
                return part(through_func(*flat(args)), args)
            if forward_ad._current_level >= 0:
                _refuse_tangents(name, args)
            if _dispatch_modes() or _function_mode() or _tracing_state() or args[0].is_meta:
                return part(overload(*flat(args)), args)
            recording, with_gradient = _is_grad_enabled(), False
            for place in places:
                arg = args[place]
                kind = type(arg)
                if kind is Tensor or kind is Parameter:
                    if recording and arg.requires_grad:
                        with_gradient = True
                elif isinstance(arg, Tensor):
                    return part(overload(*flat(args)), args)
            return apply(*args) if with_gradient else at_once(*args)

        def in_backward(dy: Any, *args: Any) -> Any:
            if (
                type(dy) is not Tensor
                or _is_grad_enabled()
                or is_dynamo_compiling()
                or _transforms_active()
                or _dispatch_modes()
                or _function_mode()
                or _tracing_state()
                or dy.is_meta
            ):
                return call(dy, *args)
            return at_once(dy, *args)

        call.__name__ = name
        call.in_backward = in_backward  # type: ignore[attr-defined]
        return call

    at_once = eager or run
    call: Any = caller(forward, at_once, _whole)
    if first is not None:
        call.first = caller(forward_first, lambda *args: at_once(*args)[0], first)
    return call


def _whole(results: Any, args: tuple) -> Any:
    return results


def first_result(results: tuple, args: tuple) -> Any:
    """``first`` of :func:`define`, where nothing is left to do."""
    return results[0]


def _only_first_has_gradient(ctx: Any, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def is_eager(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether an operation on these would compute at once, with plain tensors."""
    if is_dynamo_compiling() or _transforms_active() or _dispatch_modes() or _function_mode() or _tracing_state():
        return False
    for one in others:
        if one is not None and type(one) not in _PLAIN:
            return False
    return type(x) in _PLAIN and not x.is_meta


def _autograd_kernel(name: str, overload: Any, setup: Any, backward: Any) -> Callable[..., Any]:
    """What the dispatcher calls where gradients may be needed.

    Not ``torch.library.register_autograd``, whose kernel drops the tangents of forward mode without a word.
    """

    def below(keyset: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx: Any, *args: Any) -> Any:
        inputs, keyset = args[:-1], args[-1]
        output = below(keyset, *inputs)
        setup(ctx, inputs, output)
        return output

    def backward_of_args(ctx: Any, *gradients: Any) -> tuple:
        return (*backward(ctx, *gradients), None)

    function: Any = _function(name, forward=forward, backward=backward_of_args)
    # Function.apply refuses what has no setup_context under torch.func; where that is compiled, this kernel is called
    # for one level of it, whose tensors are like any others here.
    apply = super(torch.autograd.Function, function).apply

    def kernel(keyset: Any, *args: Any) -> Any:
        if torch._C._is_fwd_grad_enabled():
            _refuse_tangents(name, args)
        if _is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
            if _transforms_active():
                with enable_single_level_autograd_function():
                    return apply(*args, keyset)
            return apply(*args, keyset)
        return below(keyset, *args)

    return kernel


def _function(name: str, **methods: Any) -> type:
    title = "".join(part.capitalize() for part in name.split("_"))
    return type(title, (torch.autograd.Function,), {key: staticmethod(value) for key, value in methods.items()})


def _places_of_tensors(overload: Any) -> tuple[int, ...]:
    """Where tensors are among the arguments."""
    return tuple(place for place, argument in enumerate(overload._schema.arguments) if "Tensor" in str(argument.type))


def _without_gradient(
    overload: Any, run: Callable[..., Any], pack: Callable[[tuple], tuple], flat: Callable[[tuple], tuple]
) -> Callable[..., Any]:
    """The call of an operation whose results have no gradient."""

    places = _places_of_tensors(overload)

    def call(*args: Any) -> Any:
        if is_dynamo_compiling() or _transforms_active() or _dispatch_modes() or _function_mode() or _tracing_state():
            return overload(*flat(args))
        for place in places:
            arg = args[place]
            if arg is not None and (type(arg) not in _PLAIN or arg.is_meta):
                return overload(*flat(args))
        return run(*args)

    return call


def _transformable(name: str, overload: Any, setup: Any, backward: Any, vmap: Any) -> Any:
    def forward(*args: Any) -> Any:
        return overload(*args)

    return _function(name, forward=forward, setup_context=setup, backward=backward, vmap=vmap)


def _loop(call: Callable[..., Any]) -> Callable[..., Any]:
    """A rule for ``vmap``: one call an index of the mapped axis, results stacked on axis 0."""

    def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
        def at(index: int) -> list:
            return [
                arg.select(dim, index) if isinstance(arg, torch.Tensor) and dim is not None else arg
                for arg, dim in zip(args, in_dims, strict=True)
            ]

        results = [call(*at(index)) for index in range(info.batch_size)]
        if isinstance(results[0], tuple):
            return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])
        return torch.stack(results), 0

    return vmap


def _refuse_tangents(name: str, args: tuple) -> None:
    for arg in args:
        # Of level 0, the only one that there is: within a compiled graph nothing tells which is current.
        if isinstance(arg, torch.Tensor) and torch._VF._unpack_dual(arg, level=0)[1] is not None:
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
