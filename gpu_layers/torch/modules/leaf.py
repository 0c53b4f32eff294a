"""Modules that ``torch.fx`` keeps whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from torch.fx import Proxy

_Forward = TypeVar("_Forward", bound=Callable[..., Any])


def leaf(forward: _Forward) -> _Forward:
    """A ``forward`` that ``torch.fx`` does not trace into, as it does not into those of torch.nn's own modules."""

    @wraps(forward)
    def call(self: Any, input: Any, *others: Any, **named: Any) -> Any:
        if isinstance(input, Proxy) and input.tracer.root is not self:
            tracer: Any = input.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input, *others), named)
        return forward(self, input, *others, **named)

    return call  # type: ignore[return-value]
