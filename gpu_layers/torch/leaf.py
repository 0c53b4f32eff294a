"""What is no tensor and yet is passed to a module: modules are leaves to ``torch.fx``, as torch.nn's own are."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy

from gpu_layers.torch.checks import check_tensor


def call_of(module: nn.Module, *args: Any) -> Any:
    """What ``forward`` returns of such arguments: a call of the module in the graph that is traced, if it is in one.

    Raises
    ------
    TypeError
        If the first argument is no Proxy of ``torch.fx``, or the module all that is traced.
    """
    proxy = args[0]
    if not isinstance(proxy, Proxy) or proxy.tracer.root is module:
        check_tensor(proxy)
    return proxy.tracer.create_proxy("call_module", proxy.tracer.path_of_module(module), args, {})
