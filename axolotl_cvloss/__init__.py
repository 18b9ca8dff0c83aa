"""Losses of semantic segmentation for fine-tuning language models.

The names below are imported on first use, so that ``import axolotl_cvloss`` loads neither torch nor a host.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Objective": "objective",
    "ObjectiveResult": "objective",
    "install": "installation",
    "uninstall": "installation",
    "register_loss": "registry",
    "available_losses": "registry",
    "hookimpl": "hookspecs",
    "attach": "hosts.transformers",
    "CVLossPlugin": "hosts.axolotl",
    "CVLossSFTConfig": "hosts.trl",
    "CVLossSFTTrainer": "hosts.trl",
}

__all__ = [
    "CVLossPlugin",
    "CVLossSFTConfig",
    "CVLossSFTTrainer",
    "Objective",
    "ObjectiveResult",
    "__version__",
    "attach",
    "available_losses",
    "hookimpl",
    "install",
    "register_loss",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
