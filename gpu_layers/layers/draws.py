"""How a layer takes the next numbers of its generator: once for each training forward, none if that raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_layers import random
from gpu_layers.core.array import Array
from gpu_layers.layers.calls import earlier_calls


def check_generator(generator: object) -> random.Generator | None:
    """A generator, or None; TypeError for anything else."""
    if not (generator is None or isinstance(generator, random.Generator)):
        raise TypeError(f"generator must be a gpu_layers.Generator, got {type(generator).__name__}")
    return generator


def drawn(layer: Any, operation: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, Array]:
    """``operation(*arguments, seed, offset, rng_state=..., **options)``, with the next numbers of a layer's generator.

    A layer that is called several times within another keeps the numbers of each call in an array of its own,
    ``_taken`` and then ``_taken_again``. These arrays stay the same for ever, as a captured graph refers to them.

    Returns
    -------
    results
        Of the operation.
    taken : array or None
        Where the numbers of this call are on a device, for its backward.
    """
    generator = layer.generator or random.default_generator
    if random.is_by_counter(generator):
        # What follows, without an object that is made for the call.
        seed, offset = generator.take(1)
        try:
            return operation(*arguments, seed, offset, **options), None
        except BaseException:
            generator.give_back(offset, 1)
            raise
    number = earlier_calls(layer) if generator.is_on_device else 0
    again = layer._taken_again
    before = layer._taken if number == 0 else again[number - 1] if number <= len(again) else None
    with generator.call(before) as call:
        results = operation(*arguments, call.seed, call.offset, rng_state=call.rng_state, **options)
    if call.taken is not None:
        if number:
            layer._taken_again = (*again[: number - 1], call.taken, *again[number:])
        elif call.taken is not layer._taken:
            layer._taken = call.taken
    return results, call.taken
