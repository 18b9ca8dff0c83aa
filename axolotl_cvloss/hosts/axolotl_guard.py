"""Stops a run of Axolotl that has the key ``cv_loss`` but not the plugin.

Axolotl drops keys that none of its plugins knows, and goes on without a plugin that it cannot import. Where the line
under ``plugins:`` is missing or misspelt, nothing of this package would run, and training would use another loss.
So ``watch`` is an entry point of the group ``torch.backends``, which torch calls when it is imported. It does nothing
unless Axolotl's configuration is imported later.
"""

import re
import sys
from collections.abc import Sequence
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

MODULE = "axolotl.utils.config"
KEY = "cv_loss"
# The key, and what sets a part of it, in a YAML or on the command line.
ASKED = re.compile(r"(--)?cv[-_]loss($|=|\.|__|--)")


def watch() -> None:
    """Check what Axolotl makes of a config, once its module is imported."""
    if not any(isinstance(finder, Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, Watch())


class Watch(MetaPathFinder):
    """Adds the check to one module as it is imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                module.validate_config = checked(module.validate_config)  # type: ignore[attr-defined]

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def checked(validate_config: Any) -> Any:
    @wraps(validate_config)
    def validate(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        validated = validate_config(cfg, *args, **kwargs)
        if KEY not in validated and any(ASKED.match(str(name)) for name in [*cfg, *sys.argv]):
            raise ValueError(
                f"{KEY}: the config has this key, but its plugin is not loaded, so the run stops here. Put "
                "axolotl_cvloss.CVLossPlugin under plugins; if it stands there already, its name is misspelt"
            )
        return validated

    return validate
