"""What the catalogue says of an operation."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from gpu_layers.catalogue.case import Arrays, Case
from gpu_layers.core.array import Array, Options
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.runtime.kernel import FLOAT_DTYPES

FORWARD, BACKWARD = "forward", "backward"

Shape = tuple[int, ...]
#: y, and what the backward needs.
Called: TypeAlias = tuple[Array, Any]

#: Batches of images, (N, C, H, W): two that are well beyond the L2 cache, and two that fit into it.
LARGE_IMAGES = ((64, 256, 56, 56), (256, 64, 112, 112))
SMALL_IMAGES = ((32, 64, 28, 28), (128, 512, 7, 7))
#: One image for inference.
SINGLE_IMAGE = ((1, 3, 224, 224),)
IMAGES = (*LARGE_IMAGES, *SMALL_IMAGES, *SINGLE_IMAGE)
#: (N, C): what lies between the layers of a perceptron or a transformer.
LARGE_ROWS = ((8192, 4096),)
SMALL_ROWS = ((64, 1000),)


@dataclass(frozen=True)
class Sizes:
    """What byte counts are made of.

    Attributes
    ----------
    inputs, outputs : int
        Elements of x and of y.
    itemsize : int
        Bytes of one.
    shape : tuple of int
        (N, C, *spatial) of x.
    channels_last : bool
    """

    inputs: int
    outputs: int
    itemsize: int
    shape: Shape = ()
    channels_last: bool = False

    @property
    def positions(self) -> int:
        """Elements of a channel of x."""
        return self.inputs // self.shape[1]

    @property
    def statistic(self) -> int:
        """Bytes of one number for each channel, of the type that statistics have."""
        return self.accumulated * self.shape[1]

    @property
    def accumulated(self) -> int:
        """Bytes of a number of the type that is computed in."""
        return max(self.itemsize, 4)

    def elements(self, inputs: int, outputs: int = 0) -> int:
        """Bytes of this many arrays like x and like y."""
        return self.itemsize * (inputs * self.inputs + outputs * self.outputs)


#: Bytes of a pass, by the sizes of its arrays.
Bytes = Callable[[Sizes, str], int]


def per_pass(forward: Callable[[Sizes], int], backward: Callable[[Sizes], int]) -> Bytes:
    """Bytes that have a formula of their own for each pass."""
    return lambda sizes, direction: (forward if direction == FORWARD else backward)(sizes)


@dataclass(frozen=True)
class LayerExample:
    """A layer as tests over all layers make it.

    Attributes
    ----------
    kind : type
    arguments : tuple
        For an input of four channels.
    options : dict
    axes : int
        Of its input.
    inputs : int
        How many arrays it takes.
    """

    kind: type
    arguments: tuple[object, ...] = ()
    options: Options = field(default_factory=dict)
    axes: int = 2
    inputs: int = 1

    def make(self, dtype: np.dtype, generator: object) -> Any:
        """A new layer, for inputs of a dtype, that draws from a generator if it draws at all."""
        taken = inspect.signature(self.kind).parameters
        given = {"dtype": accumulation_dtype(dtype), "generator": generator}
        return self.kind(*self.arguments, **self.options, **{name: given[name] for name in given if name in taken})


def of_ranks(*kinds: type, arguments: tuple[object, ...], **options: Any) -> tuple[LayerExample, ...]:
    """Layers of the same arguments whose names end in their number of spatial axes, 1d for example."""
    return tuple(LayerExample(kind, arguments, axes=int(kind.__name__[-2]) + 2, **options) for kind in kinds)


def _same_shape(shape: Shape) -> Shape:
    return shape


def _no_traffic(operation: Operation, dtype: np.dtype) -> Iterator[Any]:
    return iter(())


@dataclass(frozen=True, eq=False)
class Operation:
    """An operation: how it is run here and by others, how its results are verified, and the least it must move.

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
    floor, torch_bytes : callable
        ``(sizes, direction) -> bytes``: the fewest, each input once and each output once, what belongs to channels
        included; what PyTorch's own kernels move, by their algorithm.
    cases : tuple of callable
        Each gives cases (``case.Case``) that compare the kernels with the reference.
    traffic : callable
        Takes this operation and a dtype, and gives the cases (``traffic.TrafficCase``) whose bytes are counted.
    dtypes : tuple of numpy.dtype
        Those.
    layers : tuple of LayerExample
        Those that are made of it.
    kept : callable or None
        Of what drops elements together, or has padding: shape (N, C, *spatial) -> the part of x that is read.
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
    """

    name: str
    shapes: tuple[Shape, ...]
    forward: Callable[[Arrays, bool], Called]
    backward: Callable[[Array, Any], Array] | None
    floor: Bytes
    torch_bytes: Bytes
    cases: tuple[Callable[[], Iterator[Case]], ...] = ()
    traffic: Callable[[Operation, np.dtype], Iterator[Any]] = _no_traffic
    dtypes: tuple[np.dtype, ...] = FLOAT_DTYPES
    layers: tuple[LayerExample, ...] = ()
    kept: Callable[[Shape], float] | None = None
    torch: Callable[[ModuleType, Arrays], Array] | None = None
    expression: Callable[[ModuleType, Arrays, bool], Array] | None = None
    gradient: Callable[[ModuleType, Arrays, bool], Array] | None = None
    jax: Callable[[ModuleType, Arrays, bool], Array] | None = None
    output_shape: Callable[[Shape], Shape] = field(default=_same_shape)
    layouts: tuple[bool, ...] = (False,)
    per_channel: tuple[str, ...] = ()
    like_x: tuple[str, ...] = ()
    takes_maximum: bool = False
    rounds_gradient: bool = False
    independent: str = "images"
    is_random: bool = False
    is_training: bool = True

    def sizes(self, shape: Shape, itemsize: int) -> Sizes:
        """What byte counts of a shape (N, C, *spatial) are made of."""
        inputs = math.prod(shape)
        return Sizes(inputs, math.prod(self.output_shape(shape)), itemsize, tuple(shape))

    def called(self, name: str, **changes: Any) -> Operation:
        """The same operation called in another way, which has no cases and no layers of its own."""
        return replace(self, name=name, **{"cases": (), "traffic": _no_traffic, "layers": (), **changes})

    @property
    def passes(self) -> tuple[str, ...]:
        """The passes that there are."""
        return (FORWARD,) if self.backward is None else (FORWARD, BACKWARD)
