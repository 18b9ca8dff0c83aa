"""Any loss on a small made answer: its value as one token is learnt, and its gradient over rows and classes."""

from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine.terms import Loss
from ..objective.objective import Objective

VOCABULARY = ("1", "2", "3", "5", "+", "=", "-", ".")
ANSWER = ("1", "2", "+", "3", "=", "1", "5")
P = torch.tensor([0.9, 0.4, 0.95, 0.7, 0.95, 0.5, 0.3], dtype=torch.float64)  # of each token; the last one's is varied
GRID = torch.arange(1, 100, dtype=torch.float64) / 100
LABELS = torch.tensor([VOCABULARY.index(token) for token in ANSWER])


class Tokenizer:
    """As much of one as losses of numbers ask for."""

    def get_vocab(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(VOCABULARY)}


class Look(NamedTuple):
    """What a loss says of the answer.

    p: (n,), the probabilities of the last token.
    value: (n,), the loss at each.
    pull: (n,), what the gradient adds to the logit of the last token, -dL/dz.
    map: (rows, V), what it adds to each logit of the answer as it is made.
    """

    p: Tensor
    value: Tensor
    pull: Tensor
    map: Tensor


def logits(p: Tensor) -> Tensor:
    """(rows, V), float64: those of the answer, where its last token has the probability ``p``."""
    drawn = torch.randn(len(ANSWER), len(VOCABULARY), generator=torch.Generator().manual_seed(0), dtype=P.dtype)
    index = LABELS[:, None]
    others = drawn.scatter(1, index, -torch.inf).logsumexp(1, keepdim=True)
    return drawn.scatter(1, index, torch.cat([P[:-1], p.reshape(1)]).logit()[:, None] + others)


def look(loss: Loss, parameters: Mapping[str, Any]) -> Look:
    """A loss on the answer, alone and with weight 1."""
    counts = torch.bincount(LABELS, minlength=len(VOCABULARY))
    objective = Objective.from_config({loss.name: dict(parameters)}, tokenizer=Tokenizer(), label_counts=counts)

    def at(p: Tensor) -> tuple[Tensor, Tensor]:
        leaf = logits(p).requires_grad_()
        # The reference model of losses that need one is the answer as it is made.
        value = objective.from_logits(leaf, LABELS, shift=False, reference_logps=P.log()).loss
        return value.detach(), -torch.autograd.grad(value, leaf)[0]

    values, pulls = zip(*(at(p) for p in GRID), strict=True)
    return Look(GRID, torch.stack(values), torch.stack(pulls)[:, -1, LABELS[-1]], at(P[-1])[1])


def save(looks: Mapping[str, Look], path: Path) -> None:
    """A picture: value and pull against p, a line for each name, and a map of the pull for each.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: The name of the file does not end in a format that matplotlib writes.
    """
    from matplotlib.figure import Figure

    rows = ceil((2 + len(looks)) / 3)
    figure = Figure(figsize=(12, 0.4 + 3.6 * rows), layout="constrained")
    left, right, *maps = figure.subplots(rows, 3, squeeze=False).flat
    written = " ".join(ANSWER)
    for name, (p, value, pull, _) in looks.items():
        left.plot(p, value, label=name)
        right.plot(p, pull, label=name)
    left.set(title=f"value on the answer  {written}", xlabel=f"probability p of its last token, {ANSWER[-1]}")
    right.set(title=f"pull on the logit of {ANSWER[-1]}, -dL/dz", xlabel=f"probability p of {ANSWER[-1]}")
    right.axhline(0, color="black", linewidth=0.5)
    left.legend(frameon=False)
    for axes, (name, seen) in zip(maps, looks.items(), strict=False):
        most = float(seen.map.abs().max()) or 1.0
        image = axes.imshow(seen.map, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
        figure.colorbar(image, ax=axes)
        axes.set(title=f"{name}: -dL/dz", xlabel="token of the vocabulary", ylabel="row: its token, and p")
        axes.set_xticks(range(len(VOCABULARY)), VOCABULARY)
        axes.set_yticks(range(len(ANSWER)), [f"{token}  {p:g}" for token, p in zip(ANSWER, P.tolist(), strict=True)])
    for axes in maps[len(looks) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=100)
