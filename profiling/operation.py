"""What the benchmark has to know of an operation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gpu_layers.verification.floors import BACKWARD, FORWARD, Sizes

Arrays = dict[str, Any]
Shape = tuple[int, ...]

#: Batches of images, (N, C, H, W): two that are well beyond the L2 cache, and two that fit into it.
LARGE_IMAGES = ((64, 256, 56, 56), (256, 64, 112, 112))
SMALL_IMAGES = ((32, 64, 28, 28), (128, 512, 7, 7))
#: One image for inference.
SINGLE_IMAGE = ((1, 3, 224, 224),)
#: (N, C): what lies between the layers of a perceptron or a transformer.
LARGE_ROWS = ((8192, 4096),)
SMALL_ROWS = ((64, 1000),)


def _same_shape(shape: Shape) -> Shape:
    return shape


@dataclass(frozen=True, eq=False)
class Operation:
    """An operation: how it is run here and by others, and the least it must move.

    Arrays come by name: ``x`` and ``dy``; per channel ``gamma``, ``beta``, ``mean``, ``var``, if asked for; and
    ``start``, the flat index of ``x``'s first element in the whole array, which is 0 but where a part is checked.
    Arrays are in memory order: channels on the last axis where ``channels_last``. PyTorch's tensors are (N, C, ...)
    always, with these strides.

    Attributes
    ----------
    name : str
        As in ``gpu_layers.ops``.
    shapes : tuple of shapes (N, C, *spatial)
        Those of the reference list that make sense, the most telling one first.
    forward : callable
        ``(arrays, channels_last) -> (y, saved)``, with the public operation.
    backward : callable or None
        ``(dy, saved) -> dx``, or a tuple that begins with it.
    floor, torch_bytes : dict of str to callable
        Of each pass, ``sizes -> bytes``: the fewest (``gpu_layers.verification.floors``); what PyTorch's own kernels
        move, by their algorithm.
    kept : callable or None
        Of what drops elements together, or has padding: shape (N, C, *spatial) -> the part of x that is read.
    by_arrays : dict of str to callable
        Of each pass that is not made of our kernels alone, ``sizes -> bytes`` that the array library moves besides.
    torch : callable or None
        ``(torch.nn.functional, tensors) -> y``, as PyTorch's users write it. Its backward is autograd's.
    expression, gradient : callable or None
        ``(xp, arrays, channels_last) -> y`` (``-> dx``) in array expressions, for CuPy.
    jax : callable or None
        ``(jax, arrays, channels_last) -> y``. Its backward is ``jax.vjp``'s.
    output_shape : callable
        Shape (N, C, *spatial) of y.
    layouts : tuple of bool
        Values of ``channels_last`` to time.
    per_channel, like_x : tuple of str
        The arrays that it takes besides x and dy, with a value a channel, and of x's shape. The latter stay away from
        0, so that what is added to them does not cross the step in the derivative of ReLU.
    takes_maximum : bool
        Whether it looks for the largest of values that it has computed: x is then made of eighths and gamma stays away
        from 0, so that values are equal or well apart in every dtype, and float64 finds the same ones.
    rounds_gradient : bool
        Whether backward rounds a gradient to the dtype of x between its steps, as it does where they are apart.
    independent : {"elements", "images", "channels"}
        What can be checked without the rest: parts of the flat array, images of the batch, or channels.
    is_random : bool
        Whether others give other results by design.
    is_training : bool
        Whether a backward may follow, for which forward keeps what it needs.
    is_modelled : bool
        Whether the model can execute the kernels: where they read does not depend on what others have computed.
    """

    name: str
    shapes: tuple[Shape, ...]
    forward: Callable[[Arrays, bool], tuple[Any, Any]]
    backward: Callable[[Any, Any], Any] | None
    floor: dict[str, Callable[[Sizes], int]]
    torch_bytes: dict[str, Callable[[Sizes], int]]
    kept: Callable[[Shape], float] | None = None
    by_arrays: dict[str, Callable[[Sizes], int]] = field(default_factory=dict)
    torch: Callable[[Any, Arrays], Any] | None = None
    expression: Callable[[Any, Arrays, bool], Any] | None = None
    gradient: Callable[[Any, Arrays, bool], Any] | None = None
    jax: Callable[[Any, Arrays, bool], Any] | None = None
    output_shape: Callable[[Shape], Shape] = field(default=_same_shape)
    layouts: tuple[bool, ...] = (False,)
    per_channel: tuple[str, ...] = ()
    like_x: tuple[str, ...] = ()
    takes_maximum: bool = False
    rounds_gradient: bool = False
    independent: str = "images"
    is_random: bool = False
    is_training: bool = True
    is_modelled: bool = True

    def sizes(self, shape: Shape, itemsize: int) -> Sizes:
        """What byte counts of a shape (N, C, *spatial) are made of."""
        inputs = math.prod(shape)
        return Sizes(inputs, math.prod(self.output_shape(shape)), itemsize, tuple(shape))

    @property
    def passes(self) -> tuple[str, ...]:
        """The passes that there are."""
        return (FORWARD,) if self.backward is None else (FORWARD, BACKWARD)
