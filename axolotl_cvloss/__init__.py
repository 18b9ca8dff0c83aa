"""Losses of semantic segmentation for fine-tuning language models.

The names below are imported on first use, so that ``import axolotl_cvloss`` loads neither torch nor a host.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers; ``_HOME`` says the same to Python
    from .hosts.axolotl import CVLossPlugin as CVLossPlugin
    from .hosts.transformers import attach as attach
    from .hosts.trl import CVLossSFTConfig as CVLossSFTConfig
    from .hosts.trl import CVLossSFTTrainer as CVLossSFTTrainer
    from .losses.hookspecs import hookimpl as hookimpl
    from .losses.registry import available_losses as available_losses
    from .losses.registry import register_loss as register_loss
    from .model.installation import install as install
    from .model.installation import uninstall as uninstall
    from .objective.config import ConfigError as ConfigError
    from .objective.objective import Objective as Objective
    from .objective.objective import ObjectiveResult as ObjectiveResult

__version__ = "0.1.0"

_HOME = {
    "ConfigError": "objective.config",
    "Objective": "objective.objective",
    "ObjectiveResult": "objective.objective",
    "install": "model.installation",
    "uninstall": "model.installation",
    "register_loss": "losses.registry",
    "available_losses": "losses.registry",
    "hookimpl": "losses.hookspecs",
    "attach": "hosts.transformers",
    "CVLossPlugin": "hosts.axolotl",
    "CVLossSFTConfig": "hosts.trl",
    "CVLossSFTTrainer": "hosts.trl",
}

__all__ = [
    "CVLossPlugin",
    "CVLossSFTConfig",
    "CVLossSFTTrainer",
    "ConfigError",
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
        from difflib import get_close_matches

        hint = "".join(f"; did you mean {match}?" for match in get_close_matches(name, _HOME, n=1))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
