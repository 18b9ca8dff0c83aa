"""A loss by its name, and the plugin manager that finds losses of other packages."""

import difflib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, TypeVar, get_type_hints

import pluggy
from pydantic import BaseModel, ConfigDict, create_model

from . import hookspecs

Function = TypeVar("Function", bound=Callable[..., Any])

# What the function of a loss is given, by family. Its further arguments have defaults and are its YAML parameters.
FAMILIES: dict[str, dict[str, str]] = {
    "token": {
        "logp": "(N,) log-probability of each row's target",
        "lse": "(N,) logsumexp of each row's logits",
        "mean_logit": "(N,) mean of each row's logits",
        "rarity": "(N,) (n_min / n_y)^(1/4), n_y how often the target is a label in the training set; no gradient",
    },
    "row": {
        "logits": "(N, V) logits of some rows, float32 or float64",
        "labels": "(N,) their targets",
    },
    "number": {
        "number_logits": "(n, K) logits at the number tokens, of the rows whose target is one",
        "values": "(K,) the values of the number tokens",
        "target": "(n,) the value of each row's target",
    },
    "region": {
        "intersection": "(C,) probability of class c summed over the rows labelled c",
        "predicted": "(C,) probability of class c summed over all rows of the set",
        "labelled": "(C,) number of rows labelled c",
        "logp": "(n,) log-probability of the target of each row of the set",
    },
    "ranking": {
        "errors": "(M,) errors, by class and from large to small within a class",
        "foreground": "(M,) bool, whether the row of an error is labelled with the class",
        "segment": "(M,) index 0..C-1 of the class of an error",
        "labelled": "(C,) number of rows labelled with the class",
    },
    "document": {
        "logp": "(n,) log-probability of the target of each row of one set",
    },
    "dense": {
        "logits": "(n, V) logits of the rows of one set, float32 or float64",
        "probabilities": "(n, V) their softmax",
        "labels": "(n,) their targets",
    },
}
SET_FAMILIES = ("region", "ranking", "document", "dense")
RESERVED = (
    *("loss", "weight", "scope", "per", "reduce", "goldfish"),
    *("terms", "head", "example_weights", "reference"),
)


@dataclass(frozen=True)
class Loss:
    """A registered loss: its function and all that is said about it to people."""

    name: str
    family: str
    function: Callable[..., Any]
    statistics: tuple[str, ...]
    parameters: type[BaseModel]
    formula: str
    source: str
    summary: str
    helps: str = ""
    hurts: str = ""
    reference: Callable[..., Any] | None = None
    only_if: dict[str, str] = field(default_factory=dict)
    requires: str = ""

    @property
    def per_set(self) -> bool:
        return self.family in SET_FAMILIES

    @property
    def needs_more(self) -> bool:
        """Whether logits and labels are not enough, but a tokenizer or the counts of labels are needed too."""
        return self.family == "number" or "rarity" in self.statistics

    @property
    def built_in(self) -> bool:
        """Whether it is of this package, and not of another one that is installed, or of a script."""
        return self.function.__module__.startswith("axolotl_cvloss.")

    def __reduce__(self) -> Any:
        """By its name, as its parameters are a class that exists nowhere else."""
        return get_loss, (self.name,)


_losses: dict[str, Loss] = {}


def register_loss(
    name: str,
    *,
    family: str,
    reference: Callable[..., Any] | None = None,
    only_if: dict[str, str] | None = None,
    requires: str = "",
) -> Callable[[Function], Function]:
    """Make a function a loss that the ``cv_loss`` key knows by ``name``.

    The arguments of the function without a default are the statistics it needs; ``FAMILIES`` lists them. Its
    arguments with a default become YAML parameters, with the bounds of their annotations. The lines ``Formula:``,
    ``Source:``, ``Helps:`` and ``Hurts:`` of its docstring are shown to users.

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

    Raises:
        ValueError: The name is taken or malformed, the family unknown, an argument is no statistic of it, or a
            default is out of the bounds of its annotation.
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
            if argument.default is argument.empty:
                statistics.append(argument.name)
            else:
                fields[argument.name] = (hints.get(argument.name, type(argument.default)), argument.default)
        if not statistics or not set(statistics) <= set(FAMILIES[family]):
            raise ValueError(
                f"loss {name!r}: arguments without a default must be statistics of the family {family!r} "
                f"({', '.join(FAMILIES[family])}), not {', '.join(statistics) or 'none'}"
            )
        if taken := set(fields) & {*RESERVED, *FAMILIES[family]}:
            raise ValueError(f"loss {name!r}: {', '.join(sorted(taken))} cannot be the name of a parameter")
        if not set(only_if or {}) <= set(statistics) or not set((only_if or {}).values()) <= set(fields):
            raise ValueError(f"loss {name!r}: only_if maps statistics of the loss to parameters of it, not {only_if}")
        config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)
        parameters = create_model(f"{name}_parameters", __config__=config, **fields)  # type: ignore[call-overload]
        parameters()  # the defaults must lie within the bounds too
        text = inspect.getdoc(function) or ""
        _losses[name] = Loss(
            name=name,
            family=family,
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
        )
        return function

    return register


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


def nearest(word: str, allowed: Any) -> str:
    """``did you mean X? `` for the nearest allowed word, or nothing."""
    match = difflib.get_close_matches(str(word).lower(), list(allowed), n=1, cutoff=0.5)
    return f"did you mean {match[0]}? " if match else ""


_manager: pluggy.PluginManager | None = None


def plugin_manager() -> pluggy.PluginManager:
    """The plugin manager, with the built-in losses and those of installed packages registered.

    The hook is historic: a plugin object that is registered later is called at once.
    """
    global _manager
    if _manager is not None:
        return _manager
    from . import losses

    # Set first, as a package may use `register_loss` while it is imported below.
    _manager = manager = pluggy.PluginManager(hookspecs.PROJECT)
    try:
        manager.add_hookspecs(hookspecs)
        manager.hook.cvloss_register_losses.call_historic(kwargs={"register": register_loss})
        for module in losses.BUILT_IN:
            manager.register(module)
        for entry in entry_points(group=hookspecs.PROJECT):
            try:
                manager.load_setuptools_entrypoints(hookspecs.PROJECT, entry.name)
            except ImportError as error:
                package = entry.dist.name if entry.dist else entry.value
                error.msg = f"{package}, a package with losses, cannot be imported: {error.msg}"
                raise
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
