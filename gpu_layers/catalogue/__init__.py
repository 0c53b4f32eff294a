"""Every operation, declared once: how it is run, verified and timed, and what it moves.

A family's module has the cases of its operations and, below them, the operations. ``gpu-layers verify`` runs the cases
and counts the traffic; ``profiling`` times and models the operations; tests over all operations and layers take theirs
from here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from gpu_layers.catalogue import (
    activation,
    activation_dropout,
    batch_norm,
    batch_norm_max_pool,
    batch_norm_variants,
    dropout,
    fractional_max_pool,
    lp_pool,
    max_unpool,
    pooling,
)
from gpu_layers.catalogue.case import Case
from gpu_layers.catalogue.operation import LayerExample, Operation
from gpu_layers.catalogue.traffic import TrafficCase

#: The modules of each page of the documents.
_FAMILIES = {
    "dropout": (dropout, activation_dropout),
    "networks": (activation,),
    "batch_norm": (batch_norm, batch_norm_max_pool, batch_norm_variants),
    "pooling": (pooling, fractional_max_pool, lp_pool, max_unpool),
}
#: Their operations, by these pages.
FAMILIES: dict[str, tuple[Operation, ...]] = {
    page: tuple(one for module in modules for one in vars(module).values() if isinstance(one, Operation))
    for page, modules in _FAMILIES.items()
}
OPERATIONS: tuple[Operation, ...] = tuple(itertools.chain(*FAMILIES.values()))
#: What most networks spend their time on: measured first, and against what takes long to compile.
HEADLINE: tuple[Operation, ...] = (
    batch_norm.BATCH_NORM,
    dropout.DROPOUT,
    pooling.MAX_POOL,
    pooling.AVG_POOL,
    activation_dropout.ACTIVATION_DROPOUT,
    batch_norm_max_pool.BATCH_NORM_RELU_MAX_POOL,
)
#: Every layer that is made of them, by its name.
LAYERS: dict[str, LayerExample] = {one.kind.__name__: one for operation in OPERATIONS for one in operation.layers}


def all_cases() -> Iterator[Case]:
    """The cases that compare kernels with the reference, of every operation."""
    for operation in OPERATIONS:
        for cases in operation.cases:
            yield from cases()


def traffic_cases() -> Iterator[TrafficCase]:
    """The passes whose bytes are counted, of every operation: all dtypes and layouts, reference shapes scaled down."""
    for operation in OPERATIONS:
        for dtype in operation.dtypes:
            yield from operation.traffic(operation, dtype)
