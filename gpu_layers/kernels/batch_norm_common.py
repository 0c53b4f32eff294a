"""What the launchers of batch norm share: kernels in both layouts, what they take, and where they write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Any

import numpy as np

from gpu_layers.core.activations import NUMBERS
from gpu_layers.core.array import Array
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.kernels.arrays import ACCUMULATE_TYPES, delivered, destination, element_type, empty, ready, vector_width
from gpu_layers.kernels.batch_norm_plan import STRUCTS, THREADS, Plan
from gpu_layers.runtime.kernel import FLOAT_DTYPES, Arguments, KernelTemplate, c_name, combinations
from gpu_layers.runtime.launch import launch, resident_blocks
from gpu_layers.runtime.limits import limits

# ``kNoActivation`` of ``activation.cuh``.
_NO_ACTIVATION = -1
#: Those of ``PiecewiseLinearActivation`` there.
PIECEWISE_LINEAR = ("identity", "relu", "leaky_relu")
#: Those whose gradient is dy or 0, which the type of dy holds.
EXACT_GRADIENT = ("identity", "relu")
#: Parameters for running statistics, which those of a batch are folded into, and for :func:`arrivals`.
RUNNING_ARRAYS = ("running_mean", "running_var", "batches", "skipped", "arrived")
_WARP = 32


#: ``Epilogue`` of ``normalization.cuh``, but for the curved activations.
STRAIGHT_FUSIONS = ({"Epilogue": "kIdentity"}, {"Epilogue": "kPiecewiseLinear"})


def fusion(residual: Array | None, activation: str) -> str:
    """``Epilogue`` of ``normalization.cuh``."""
    if activation not in PIECEWISE_LINEAR:
        return "kSmooth"
    return "kIdentity" if residual is None and activation == "identity" else "kPiecewiseLinear"


def activation_number(activation: str) -> int:
    """What kernels know an activation by."""
    return NUMBERS.get(activation, _NO_ACTIVATION)


class LayoutKernel(KernelTemplate):
    """A kernel for both layouts, whose first template arguments are ``T`` and ``Layout``.

    Parameters
    ----------
    source, name : str
        Of its template.
    fusions : sequence of dict of str to str
        Template arguments after these.
    of_nchw : sequence of dict of str to str, optional
        Those of NCHW, if they are others.
    single_channels : bool
        Whether rows of channels that make no vectors are taken too.
    structs : mapping of str to numpy.dtype
        Beside the layouts.
    initialised : sequence of str
        As of :class:`KernelTemplate`.
    """

    def __init__(
        self,
        source: str,
        name: str,
        *,
        fusions: Sequence[dict[str, str]] = ({},),
        of_nchw: Sequence[dict[str, str]] | None = None,
        single_channels: bool = True,
        structs: Mapping[str, np.dtype] | None = None,
        initialised: Sequence[str] = (),
    ) -> None:
        instantiations = []
        for dtype in FLOAT_DTYPES:
            widths = (vector_width(dtype), 1) if single_channels else (vector_width(dtype),)
            choices = [("NchwLayout", fusions if of_nchw is None else of_nchw)]
            choices += [(f"NhwcLayout<{width}>", fusions) for width in widths]
            for layout, others in choices:
                instantiations += [{"T": c_name(dtype), "Layout": layout, **more} for more in others]
        super().__init__(source, name, instantiations, {**STRUCTS, **(structs or {})}, initialised)

    def launch(self, plan: Plan, x: Array, arguments: Arguments, shared_bytes: int = 0, **more: str) -> None:
        """Launch it over x, with these arguments before the layout."""
        kernel = self(T=element_type(x), Layout=plan.layout_type, **more)
        launch(kernel, plan.blocks, plan.block, (*arguments, plan.layout), shared_bytes=shared_bytes)


class PersistentKernel(LayoutKernel):
    """A kernel that reads once. ``barrier_count`` in its parameters counts the blocks of each group."""

    def __init__(self, source: str, name: str, **options: Any) -> None:
        initialised = ("barrier_count", *RUNNING_ARRAYS)
        super().__init__(source, name, single_channels=False, initialised=initialised, **options)

    def run(
        self, plan: Plan, x: Array, before: Arguments, after: Arguments, folding: Folding | None = None, /, **more: str
    ) -> bool:
        """Launch it, with these arguments before and after ``barrier_count``; False where it cannot be resident."""
        if plan.slots is None or not limits().one_read:
            return False
        kernel = self(T=element_type(x), Layout=plan.layout_type, **more)
        # With one part nobody waits for anybody.
        cooperative = plan.blocks_per_group > 1
        resident = resident_blocks(kernel, plan.block, plan.shared_bytes, x, cooperative=cooperative)
        if resident < plan.blocks_per_group:
            return False
        if cooperative:
            groups = min(plan.tiles, resident // plan.blocks_per_group)
            barrier_count = x.program.allocate((groups + 1,), np.uint32, zeroed=True)
        else:
            groups, barrier_count = min(plan.tiles, limits().max_blocks), arrivals(folding, x)
        launch(
            kernel,
            groups * plan.blocks_per_group,
            plan.block,
            (*before, barrier_count, *after, plan.layout),
            shared_bytes=plan.shared_bytes,
            cooperative=cooperative,
        )
        return True


_MERGE_STATISTICS = KernelTemplate(
    "batch_norm.cu", "batch_norm_merge_statistics", combinations(A=ACCUMULATE_TYPES), STRUCTS, RUNNING_ARRAYS
)
_MERGE_GRADIENTS = KernelTemplate("batch_norm.cu", "batch_norm_merge_gradients", combinations(A=ACCUMULATE_TYPES))


def merge(plan: Plan, template: KernelTemplate, dtype: np.dtype, arguments: Arguments) -> None:
    """Launch what merges the blocks of each channel, if there are several: a warp a channel."""
    if plan.blocks_per_group > 1:
        blocks = -(-plan.channels // (THREADS // _WARP))
        launch(template(A=c_name(dtype)), blocks, THREADS, (*arguments, plan.channels, plan.blocks_per_group))


def merge_statistics(plan: Plan, results: Arguments, dtype: np.dtype, unbiased: Any) -> None:
    """Merge the blocks of each channel, if there are several.

    Parameters
    ----------
    plan : Plan
    results : tuple
        What the statistics' kernel takes after x.
    dtype : numpy.dtype
    unbiased : int or Number
        :func:`unbiased_bits`.
    """
    gamma, beta, partial_moments, *others = results
    merge(plan, _MERGE_STATISTICS, dtype, (partial_moments, gamma, beta, *others, unbiased))


def workspace(plan: Plan, numbers: int, dtype: np.dtype, like: Array) -> Array | None:
    """Where the blocks of each channel leave this many numbers each, if there are several."""
    return None if plan.blocks_per_group == 1 else empty((plan.channels, plan.blocks_per_group, numbers), dtype, like)


#: Numbers of each channel that a forward keeps: the rows of its ``statistics``, ``StatisticsRow`` of
#: ``normalization.cuh``.
ROWS = ("mean", "var", "inv_std", "gamma", "beta")


@dataclass(frozen=True)
class Normalization:
    """What gives y from x: the channels' numbers, and what is fused."""

    mean: Array
    inv_std: Array
    gamma: Array | None
    beta: Array | None
    residual: Array | None
    activation: str

    @classmethod
    def of(cls, statistics: Array, residual: Array | None = None, activation: str = "identity") -> Normalization:
        """Of what a forward kept."""
        statistics = ready(statistics)
        mean, _, inv_std, gamma, beta = statistics.program.rows(statistics)
        return cls(mean, inv_std, gamma, beta, None if residual is None else ready(residual), activation)

    @property
    def of_channels(self) -> tuple[Array, ...]:
        """mean, inv_std, gamma and beta, which all kernels but those of the statistics take."""
        return self.mean, self.inv_std, self.gamma, self.beta

    @property
    def number(self) -> int:
        """Of the activation."""
        return activation_number(self.activation)


def sums_of_channels(plan: Plan, x: Array, out: Sequence[Array] = (None, None)) -> tuple[Array | None, Array, Array]:
    """Where the blocks of each channel leave their sums, if there are several; dgamma, dbeta: ``out``, if they can."""
    dtype = accumulation_dtype(x.dtype)
    dgamma, dbeta = (one if one is not None and one.is_contiguous else empty((plan.channels,), dtype, x) for one in out)
    return workspace(plan, 2, dtype, x), dgamma, dbeta


def merge_gradients(plan: Plan, norm: Normalization, sums: tuple[Array | None, Array, Array]) -> None:
    """Merge the blocks of each channel, if there are several; sums: of :func:`sums_of_channels`."""
    partial_sums, dgamma, dbeta = sums
    merge(plan, _MERGE_GRADIENTS, dgamma.dtype, (partial_sums, norm.inv_std, dgamma, dbeta))


def of_inputs(x: Array, norm: Normalization, out: Sequence[Array]) -> tuple[Array, Array | None]:
    """Where dx and dresidual go, the first and the last of ``out``, if there is a residual."""
    return destination(out[0], x), None if norm.residual is None else destination(out[-1], x)


def contiguous(arrays: Sequence[Array]) -> list[Array]:
    """Arrays that kernels change, or copies where they are strided; see :func:`deliver`."""
    return [one if one is None or one.is_contiguous else ready(one) for one in arrays]


def deliver(changed: Sequence[Array], arrays: Sequence[Array]) -> None:
    """Copy back what kernels have changed in copies."""
    for one, place in zip(changed, arrays, strict=True):
        if one is not None:
            delivered(one, place)


# Of a number and its bits.
_BITS = {2: (Struct("f"), Struct("I")), 4: (Struct("f"), Struct("I")), 8: (Struct("d"), Struct("Q"))}
#: How a batch is folded into running statistics: the momentum, how many values it has (0 where the kernels are told in
#: each call), and whether it is taken only if it is finite. See :class:`RunningStatistics`.
Folding = tuple[float | None, int, bool]


def needs_all(folding: Folding | None) -> bool:
    """Whether a channel depends on the others."""
    return folding is not None and (folding[0] is None or folding[2])


def unbiased_bits(values: int, dtype: np.dtype) -> int:
    """Bits of ``FoldingRule::unbiased`` for so many values a channel, of this dtype or of what it is computed in."""
    number, bits = _BITS[dtype.itemsize]
    return bits.unpack(number.pack(_unbiased(values)))[0]


def _unbiased(values: int) -> float:
    return values / max(values - 1, 1)


def folding_rule(folding: Folding | None, dtype: np.dtype) -> np.ndarray:
    """``FoldingRule`` of ``normalization.cuh``."""
    momentum, values, finite_only = folding or (0.0, 0, False)
    newest = 0.0 if momentum is None else momentum
    numbers = (1 - newest, newest, _unbiased(values), momentum is None, finite_only)
    return np.array(numbers, STRUCTS[f"FoldingRule<{c_name(dtype)}>"])


def arrivals(folding: Folding | None, like: Array) -> Array | None:
    """The count of blocks that are done, if folding a batch in needs all channels: the last block does it."""
    return like.program.allocate((1,), np.uint32, zeroed=True) if needs_all(folding) else None


def new_statistics(x: Array, plan: Plan, dtype: np.dtype) -> Array:
    """Where a forward keeps the numbers of the channels."""
    return empty((len(ROWS), plan.channels), dtype, x)


def gradients(inputs: tuple[Array, Array], out: Sequence[Array], sums: tuple[Array, Array, Array]) -> tuple[Array, ...]:
    """What a backward returns: dx, dgamma, dbeta, dresidual."""
    return all_delivered((inputs[0], *sums[1:], inputs[1]), out)


def all_delivered(found: Sequence[Array], out: Sequence[Array]) -> tuple[Array, ...]:
    """Results, some of which may be None, in the arrays of ``out`` that are not."""
    return tuple(one if one is None else delivered(one, place) for one, place in zip(found, out, strict=True))
