"""Adding the numbers of all processes after each step."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.cuda import array_module, place_of
from gpu_layers.distributed import Communicator


def added(
    communicator: Communicator, loss: float, hits: int, gradients: Mapping[str, Array]
) -> tuple[float, int, dict[str, Array]]:
    """Sums of loss, hits and gradients over all processes: one exchange, added in float64 in the order of the ranks.

    Parameters
    ----------
    communicator : Communicator
    loss, hits : float, int
        Those of this process.
    gradients : mapping of str to array
        The same keys and shapes in all processes.

    Returns
    -------
    loss, hits, gradients
        The same bits in all processes; gradients keep their dtypes.
    """
    names = list(gradients)
    first = gradients[names[0]]
    xp = array_module(first)
    with place_of(first):
        own = [xp.asarray([loss, float(hits)]), *(gradients[name].reshape(-1).astype(np.float64) for name in names)]
        total, *others = communicator.gather(xp.concatenate(own))
        for part in others:
            total = total + part
        ends = np.cumsum([2, *(gradients[name].size for name in names)])
        sums = {
            name: total[start:stop].reshape(gradients[name].shape).astype(gradients[name].dtype)
            for name, start, stop in zip(names, ends[:-1].tolist(), ends[1:].tolist(), strict=True)
        }
    return float(total[0]), int(total[1]), sums
