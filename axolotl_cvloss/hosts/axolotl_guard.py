"""Stops a run of Axolotl that has the key ``cv_loss`` but not the plugin.

Axolotl drops keys that none of its plugins knows, and goes on without a plugin that it cannot import. Where the line
under ``plugins:`` is missing or misspelt, nothing of this package would run, and training would use another loss.
So ``watch`` is an entry point of the group ``torch.backends``, which torch calls when it is imported. It does nothing
unless Axolotl's configuration is imported later. See SECURITY.md.
"""

import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULE = "axolotl.utils.config"
KEY = "cv_loss"
# The key, and what sets a part of it, in a YAML or on the command line.
ASKED = re.compile(r"(--)?cv[-_]loss($|=|\.|__|--)")


def watch() -> None:
    """Check what Axolotl makes of a config, once its module is imported. Never an error: torch would not import."""
    with suppress(Exception):
        if not any(isinstance(finder, Watch) for finder in sys.meta_path):
            sys.meta_path.insert(0, Watch())


class Watch(MetaPathFinder):
    """Adds the check to one module whenever it is imported; to ask where it lies changes nothing."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        others = (finder for finder in list(sys.meta_path) if not isinstance(finder, Watch))
        found = (finder.find_spec(name, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = Checking(spec.loader)
        return spec


class Checking(Loader):
    """The loader of the module, which is asked for everything but that last step."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        with suppress(AttributeError):  # of a version of Axolotl that validates elsewhere
            module.validate_config = checked(module.validate_config)  # type: ignore[attr-defined]


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
