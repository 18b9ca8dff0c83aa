"""A loss by its name, and the plugin manager that finds losses of other packages."""

import difflib
import inspect
import re
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar, get_type_hints

import pluggy
from pydantic import ConfigDict, create_model

from ..engine.families import FAMILIES
from ..engine.family import Family
from ..engine.terms import Loss
from . import hookspecs

Function = TypeVar("Function", bound=Callable[..., Any])

RESERVED = (
    *("loss", "weight", "scope", "per", "reduce", "goldfish", "where"),
    *("terms", "head", "example_weights", "examples", "prune", "reference_logps", "reference"),
)


_losses: dict[str, Loss] = {}


def register_loss(
    name: str,
    *,
    family: str,
    reference: Callable[..., Any] | None = None,
    only_if: dict[str, str] | None = None,
    requires: str = "",
    at_once: bool = False,
    at: dict[str, str | tuple[str, ...]] | None = None,
) -> Callable[[Function], Function]:
    """Make a function a loss that the ``cv_loss`` key knows by ``name``.

    The arguments of the function without a default are the statistics it needs; the ``statistics`` of its family list
    them. Its arguments with a default become YAML parameters, with the bounds of their annotations. The lines
    ``Formula:``, ``Source:``, ``Helps:`` and ``Hurts:`` of its docstring are shown to users.

    Args:
        name: The key in the YAML; lower case letters, digits and underscores.
        family: ``token`` gives one value a row from log p; ``row`` one value a row from the logits; ``number``
            one value a row from the logits of number tokens; ``region``
            a value a class, or one value, from class sums of a set of rows; ``ranking`` a value a class from sorted
            errors; ``document`` one value from the log-probabilities of a set; ``dense`` one value, or one a row,
            from all logits of a set, by autograd, which takes the memory that the other families save.
        reference: The form in the paper's code, ``reference(logits, labels, **parameters)``, for
            ``reference: true``.
        only_if: Statistics needed only where a parameter is not 0, such as ``{"mean_logit": "label_smoothing"}``;
            elsewhere the function gets None for them.
        requires: A package that the function imports, which not everybody has; configs that name the loss are then
            refused with a word on how to install it.
        at_once: Of the family ``region``: the value of a class depends on the statistics of this class alone, so the
            function may be given the classes of many sets at once. Without it, sets of equal size are batched by
            ``torch.vmap``, and one after the other where it cannot follow.
        at: Statistics that are taken at a parameter of the loss, such as ``{"tempered_odds": "temperature"}``, or at
            several, in a tuple.

    Raises:
        ValueError: The name is taken or malformed, the family unknown, an argument is no statistic of it or cannot be
            given by its name, or a default is out of the bounds of its annotation, or a whole number without one.
    """

    def register(function: Function) -> Function:
        plugin_manager()  # so that a taken name is found here, and not when the built-in losses are wanted
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in RESERVED:
            raise ValueError(f"{name!r} cannot name a loss: lower case letters, digits and _, and none of {RESERVED}")
        if name in _losses:
            first = _losses[name].function.__module__
            raise ValueError(
                f"a loss named {name!r} is registered already, by {first}; {function.__module__} must take another name"
            )
        if family not in FAMILIES:
            raise ValueError(f"loss {name!r}: unknown family {family!r}; allowed: {', '.join(FAMILIES)}")
        hints = get_type_hints(function, include_extras=True)
        statistics, fields = [], {}
        for argument in inspect.signature(function).parameters.values():
            if argument.kind not in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY):
                starred = str(argument).split(":")[0]
                raise ValueError(
                    f"loss {name!r}: {starred} cannot be given by its name; write out one argument for each statistic "
                    "and each parameter"
                )
            if argument.default is argument.empty:
                statistics.append(argument.name)
            else:
                fields[argument.name] = (hints.get(argument.name, type(argument.default)), argument.default)
        known = FAMILIES[family].statistics
        if not statistics or not set(statistics) <= set(known):
            raise ValueError(
                f"loss {name!r}: arguments without a default must be statistics of the family {family!r} "
                f"({', '.join(known)}), not {', '.join(statistics) or 'none'}"
            )
        if taken := set(fields) & {*RESERVED, *known}:
            raise ValueError(f"loss {name!r}: {', '.join(sorted(taken))} cannot be the name of a parameter")
        for parameter, (_, default) in fields.items():
            # A whole number is most often meant as any number, and would silently take whole numbers only.
            if parameter not in hints and not isinstance(default, bool | float | str):
                raise ValueError(
                    f"loss {name!r}: {parameter}={default!r} does not say which values are allowed; write "
                    f"{parameter}: float = ... for any number, {parameter}: int = ... for whole numbers"
                )
        if not set(only_if or {}) <= set(statistics) or not set((only_if or {}).values()) <= set(fields):
            raise ValueError(f"loss {name!r}: only_if maps statistics of the loss to parameters of it, not {only_if}")
        taken_at = {one for name in (at or {}).values() for one in ([name] if isinstance(name, str) else name)}
        if not set(at or {}) <= set(statistics) or not taken_at <= set(fields):
            raise ValueError(f"loss {name!r}: at maps statistics of the loss to parameters of it, not {at}")
        config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)
        parameters = create_model(f"{name}_parameters", __config__=config, **fields)  # type: ignore[call-overload]
        parameters()  # the defaults must lie within the bounds too
        text = inspect.getdoc(function) or ""
        _losses[name] = Loss(
            name=name,
            kind=FAMILIES[family],
            function=function,
            statistics=tuple(statistics),
            parameters=parameters,
            formula=_docline(text, "Formula"),
            source=_docline(text, "Source"),
            summary=text.split("\n", 1)[0],
            helps=_docline(text, "Helps"),
            hurts=_docline(text, "Hurts"),
            reference=reference,
            only_if=only_if or {},
            requires=requires,
            at_once=at_once,
            at=at or {},
        )
        return function

    return register


def register_family(family: Family) -> None:
    """Make a family of losses one that ``register_loss`` knows by its name; see ``engine.family``.

    Raises:
        ValueError: The name is taken.
    """
    if family.name in FAMILIES:
        raise ValueError(f"a family named {family.name!r} is there already")
    FAMILIES[family.name] = family


def available_losses() -> dict[str, Loss]:
    """All losses by name: the built-in ones, those of installed packages, and those registered in this process."""
    plugin_manager()
    return dict(sorted(_losses.items()))


def get_loss(name: str) -> Loss:
    """The loss of that name.

    Raises:
        KeyError: There is none; the message has the nearest name and all of them.
    """
    losses = available_losses()
    if name not in losses:
        raise KeyError(f"{nearest(name, losses)}allowed: {', '.join(losses)}")
    return losses[name]


# What people call a loss that has another name here, where the spelling alone would suggest another one, or none.
CALLED = {
    **dict.fromkeys(("ce", "xent", "nll", "crossentropy", "log_loss", "label_smoothing"), "cross_entropy"),
    **dict.fromkeys(("iou", "miou", "soft_iou"), "jaccard"),
    **dict.fromkeys(("ohem", "ohnm", "hard_example_mining", "bootstrapped_ce", "topk_ce"), "topk_cross_entropy"),
    **dict.fromkeys(("f1", "dsc", "soft_dice", "sorensen"), "dice"),
    **dict.fromkeys(("gdl", "gds"), "generalized_dice"),
    **dict.fromkeys(("ntl", "wasserstein", "emd"), "number_token_wasserstein"),
    **dict.fromkeys(("z_loss", "zloss"), "z_regularized"),
    "eaft": "entropy_adaptive",
    "sadice": "self_adjusting_dice",
}


def nearest(word: str, allowed: Any) -> str:
    """``did you mean X? `` for the allowed word of that meaning or of the nearest spelling, or nothing."""
    spelt = str(word).lower().strip().replace("-", "_").replace(" ", "_")
    meant = CALLED.get(spelt) or CALLED.get(spelt.removesuffix("_loss"))
    match = [meant] if meant in allowed else difflib.get_close_matches(spelt, list(allowed), n=1, cutoff=0.5)
    return f"did you mean {match[0]}? " if match else ""


_manager: pluggy.PluginManager | None = None


def plugin_manager() -> pluggy.PluginManager:
    """The plugin manager, with the built-in losses and those of installed packages registered.

    The hook is historic: a plugin object that is registered later is called at once.
    """
    global _manager
    if _manager is not None:
        return _manager
    from .. import losses

    # Set first, as a package may use `register_loss` while it is imported below.
    _manager = manager = pluggy.PluginManager(hookspecs.PROJECT)
    try:
        manager.add_hookspecs(hookspecs)
        manager.hook.cvloss_register_losses.call_historic(kwargs={"register": register_loss})
        for module in losses.BUILT_IN:
            manager.register(module)
        for entry in entry_points(group=hookspecs.PROJECT):
            # Not pluggy's load_setuptools_entrypoints, which takes the first of two packages with one name for theirs.
            package = entry.dist.name if entry.dist else entry.value
            try:
                plugin = entry.load()
            except ImportError as error:
                error.msg = f"{package}, a package with losses, cannot be imported: {error.msg}"
                raise
            manager.register(plugin, name=f"{package}:{entry.name}")
        manager.check_pending()
    except BaseException:
        # The next call must fail in the same way, not over what this one has left.
        _losses.clear()
        _manager = None
        raise
    return manager


def _docline(text: str, field: str) -> str:
    match = re.search(rf"^{field}: ((?:.+\n?)+?)(?=\n|^[A-Z][a-z]+: |\Z)", text, re.MULTILINE)
    return " ".join(match.group(1).split()) if match else ""
