"""What other packages may hook into (pluggy). A package is found by the entry-point group ``axolotl_cvloss``."""

from collections.abc import Callable
from typing import Any

import pluggy

PROJECT = "axolotl_cvloss"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(historic=True)
def cvloss_register_losses(register: Callable[..., Any]) -> None:
    """Register losses: ``register(name, family=...)(function)``, or ``register`` as a decorator.

    ``register`` is :func:`axolotl_cvloss.register_loss`. The built-in losses come through this hook too.
    """
