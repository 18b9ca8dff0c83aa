"""What ``prune`` cannot be had with. Imports no host: anybody can check a config."""

from typing import Any

from ..objective.config import KEY

FEWEST = 3  # epochs: the first knows no losses yet, and the last is whole


def conflicts(
    packed: str | None = None, streamed: str | None = None, epochs: tuple[str, Any] | None = None
) -> list[str]:
    """One line for each problem.

    Args:
        packed: The key that packs examples, where it does.
        streamed: That which streams them.
        epochs: The key for the number of epochs and its value, where no key for steps takes its place.
    """
    found = []
    if packed:
        found.append(f"{packed}: a packed line has many examples, and cannot be left out for one; switch it off")
    if streamed:
        found.append(f"{streamed}: examples are left out by their numbers, so the dataset must have a length")
    if epochs is not None and _number(epochs[1]) < FEWEST:
        found.append(
            f"{epochs[0]}: {epochs[1]}: the first epoch finds the losses and the last is whole, so it needs {FEWEST} "
            "epochs or more"
        )
    return [f"{KEY}.prune cannot be used with {problem}" for problem in found]


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):  # the host has a word on that
        return FEWEST
