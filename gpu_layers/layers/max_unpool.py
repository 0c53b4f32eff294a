"""The inverse of the max pooling layers."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_layers.core.array import Array
from gpu_layers.layers.pool_base import Pool
from gpu_layers.ops.max_unpool import max_unpool_backward, max_unpool_forward
from gpu_layers.ops.pool_arguments import PerAxis, per_axis

__all__ = ["MaxUnpool1d", "MaxUnpool2d", "MaxUnpool3d"]


class _MaxUnpool(Pool):
    """Put each value at its index in a larger plane, and 0 elsewhere.

    Parameters
    ----------
    kernel_size, stride, padding : int or tuple of int
        Those of the max pooling that made the indices: they give the output's size. ``stride`` is kernel_size by
        default.
    channels_last : bool
        Input is (N, *spatial, C) instead of (N, C, *spatial), as for the max pooling.

    Raises
    ------
    TypeError, ValueError
        For numbers that do not make a window.
    """

    _gradient = staticmethod(max_unpool_backward)

    def __init__(
        self, kernel_size: PerAxis, stride: PerAxis | None = None, padding: PerAxis = 0, *, channels_last: bool = False
    ) -> None:
        super().__init__()
        self.channels_last = bool(channels_last)
        self.kernel_size = per_axis(kernel_size, self._rank, "kernel_size")
        self.stride = self.kernel_size if stride is None else per_axis(stride, self._rank, "stride")
        self.padding = per_axis(padding, self._rank, "padding")
        for name, sizes in (("kernel size", self.kernel_size), ("stride", self.stride)):
            if min(sizes) < 1:
                raise ValueError(f"{name} should be greater than zero, but got {name}={list(sizes)}")
        if min(self.padding) < 0:
            raise ValueError(f"pad must be non-negative, but got pad: {min(self.padding)}")

    def forward(  # type: ignore[override]
        self, x: Array, indices: Array, output_size: Sequence[int] | None = None, *, check: bool = True
    ) -> Array:
        """Unpool a batch, or one sample without its batch axis.

        Parameters
        ----------
        x : array, shape (N, C, *spatial), or (N, *spatial, C) if channels_last; N may be missing
        indices : array of int64, x's shape
            As the max pooling layer returns them. Of equal indices the last counts.
        output_size : sequence of int, optional
            Size of the output, with or without N and C: several sizes may pool to the same one.
        check : bool
            Raise for an index outside the plane; on a GPU this waits for one flag.

        Returns
        -------
        array
            x's dtype.

        Raises
        ------
        TypeError, ValueError
            For a wrong array type, dtype, shape or output size, or an index outside the plane.
        RuntimeError
            With ``check=True`` while a graph is captured.
        """
        sizes = self._output_size(x, output_size)
        y, self._saved = max_unpool_forward(x, indices, sizes, channels_last=self.channels_last, check=check)
        return y

    def _output_size(self, x: Array, output_size: Sequence[int] | None) -> tuple[int, ...]:
        shape = getattr(x, "shape", ())
        spatial = shape[:-1][-self._rank :] if self.channels_last else shape[-self._rank :]
        default = tuple(
            (size - 1) * stride + kernel - 2 * pad
            for size, kernel, stride, pad in zip(spatial, self.kernel_size, self.stride, self.padding, strict=False)
        )
        if output_size is None:
            # The operation refuses an empty or missing axis.
            if min(default, default=1) < 1 and 0 not in shape:
                raise ValueError(
                    f"no input of a max pooling with {self._configuration()} has an output of spatial sizes "
                    f"{list(spatial)}, got these: the input's sizes would be {list(default)}"
                )
            return default
        sizes = tuple(output_size)
        if len(sizes) == self._rank + 2:
            sizes = sizes[1:-1] if self.channels_last else sizes[2:]
        if len(sizes) != self._rank:
            raise ValueError(
                f"output_size should be a sequence containing {self._rank} or {self._rank + 2} elements, "
                f"but it has a length of '{len(output_size)}'"
            )
        for axis, (size, middle, stride) in enumerate(zip(sizes, default, self.stride, strict=False)):
            if not middle - stride < size < middle + stride:
                raise ValueError(
                    f'invalid output_size "{sizes}" (dim {axis} must be between {middle - stride} '
                    f"and {middle + stride})"
                )
        return sizes

    def _configuration(self) -> str:
        layout = ", channels_last=True" if self.channels_last else ""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}{layout}"


class MaxUnpool1d(_MaxUnpool):
    _rank = 1


class MaxUnpool2d(_MaxUnpool):
    _rank = 2


class MaxUnpool3d(_MaxUnpool):
    _rank = 3
