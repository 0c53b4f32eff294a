"""Every operation, declared once: how it is run, verified and timed, and what it moves.

A family's module has the cases of its operations and, below them, the operations. ``gpu-layers verify`` runs the cases
and counts the traffic; ``profiling`` times and models the operations; tests over all operations and layers take theirs
from here.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Iterator

from gpu_layers.catalogue import activation_dropout, batch_norm, batch_norm_max_pool, dropout, pooling
from gpu_layers.catalogue.case import Case
from gpu_layers.catalogue.operation import LayerExample, Operation
from gpu_layers.catalogue.traffic import TrafficCase

_MODULES = [importlib.import_module(f"{__name__}.{one.name}") for one in pkgutil.iter_modules(__path__)]


def _of_page(page: str) -> Iterator[Operation]:
    modules = [module for module in _MODULES if getattr(module, "PAGE", None) == page]
    # That of the page's name is first.
    for module in sorted(modules, key=lambda module: not module.__name__.endswith(f".{page}")):
        yield from (one for one in vars(module).values() if isinstance(one, Operation))


#: The operations of all modules here, by the page of the documents that a module names.
FAMILIES = {page: tuple(_of_page(page)) for page in ("dropout", "networks", "batch_norm", "pooling")}
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
