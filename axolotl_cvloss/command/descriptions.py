"""What is said of losses to people, on the command line and in docs/: the words that no docstring of a loss has."""

import inspect
import re
from typing import Any

from ..losses.registry import Loss
from ..objective.config import allowed

VISIT = "A visit is one way through the logits, a chunk at a time; cross-entropy takes one."


def cost(loss: Loss) -> str:
    return loss.kind.cost


def needs(loss: Loss) -> str:
    """The statistics that a loss takes, with the parameter that some are needed for, and the package it imports."""
    words = [f"{name} ({loss.only_if[name]})" if name in loss.only_if else name for name in loss.statistics]
    return ", ".join([*words, f"the package {loss.requires}"] if loss.requires else words)


def remarks(loss: Loss) -> list[str]:
    """The paragraphs of the docstring between its first line and its fields."""
    text = inspect.getdoc(loss.function) or ""
    body = re.split(r"^(?:Formula|Source|Helps|Hurts): ", text.partition("\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    return [" ".join(paragraph.split()) for paragraph in body.split("\n\n") if paragraph.strip()]


def parameters(loss: Loss) -> list[dict[str, Any]]:
    """Name, default and allowed values of each parameter."""
    return [
        {"name": name, "default": field.default, "allowed": allowed(loss.parameters, name)}
        for name, field in loss.parameters.model_fields.items()
    ]


def described(loss: Loss) -> dict[str, Any]:
    """Everything that is said of a loss, as plain data, with code in single backticks as in Markdown."""
    said: dict[str, Any] = {
        "name": loss.name,
        "family": loss.family,
        "summary": loss.summary,
        "remarks": remarks(loss),
        "formula": loss.formula,
        "parameters": parameters(loss),
        "needs": {name: loss.kind.statistics[name] for name in loss.statistics},
        "requires": loss.requires,
        "cost": cost(loss),
        "source": loss.source,
        "helps": loss.helps,
        "hurts": loss.hurts,
        "reference": loss.reference is not None,
    }
    said["remarks"] = [paragraph.replace("``", "`") for paragraph in said["remarks"]]
    return {key: value.replace("``", "`") if isinstance(value, str) else value for key, value in said.items()}


def plain(value: Any) -> str:
    """A value as it stands in a YAML."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return re.sub(r"e([+-])0", r"e\1", f"{value:g}") if isinstance(value, float) else str(value)
