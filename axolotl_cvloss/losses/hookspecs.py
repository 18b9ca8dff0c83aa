"""What other packages may hook into (pluggy). A package is found by the entry-point group ``axolotl_cvloss``."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import pluggy

PROJECT = "axolotl_cvloss"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

Function = TypeVar("Function", bound=Callable[..., Any])


class Register(Protocol):
    """What ``register`` is: :func:`axolotl_cvloss.register_loss`, which says what each argument means."""

    def __call__(
        self,
        name: str,
        *,
        family: str,
        reference: Callable[..., Any] | None = None,
        only_if: dict[str, str] | None = None,
        requires: str = "",
        at_once: bool = False,
        at: dict[str, str | tuple[str, ...]] | None = None,
    ) -> Callable[[Function], Function]: ...


@hookspec(historic=True)
def cvloss_register_losses(register: Register) -> None:
    """Register losses. The built-in ones come through this hook too.

    A package needs two files. ``my_losses.py``::

        from axolotl_cvloss import hookimpl

        def shortfall(logp, scale: float = 1.0):
            return scale * (1 - logp.exp()) ** 2

        @hookimpl
        def cvloss_register_losses(register):
            register("shortfall", family="token")(shortfall)

    and ``pyproject.toml``, whose entry point names the module::

        [project]
        name = "my-losses"
        version = "1.0"
        dependencies = ["axolotl-cvloss"]

        [project.entry-points.axolotl_cvloss]
        my_losses = "my_losses"

    Where both are installed, ``cv_loss: {shortfall: {scale: 2.0}}`` trains with it.
    """
