"""What a model does beside its head: to the logits afterwards, and with labels.

Its own code tells, on logits that are made up: no table of architectures, no reading of configs. It costs one forward
without gradients, at the first batch with labels.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.ranks import everywhere
from ..engine.rows import IGNORE_INDEX
from ..engine.sources import Head, is_linear, statistics_dtype
from .head import HeadTap, partitioned

SMALL, LARGE = 2.0**-40, 2.0**60  # so small that tanh is the identity, so large that it is 1
UNLABELLED, LABELLED = 3, 8  # rows of made-up logits: small, large and mixed ones; ordinary ones, which make a loss

ANOTHER = "another process cannot do without them"

# Of the outputs of a model, and on a device, what is added to the objective, such as an auxiliary loss.
Added = Callable[[Any, torch.device], Tensor | float]


@dataclass(frozen=True)
class Verdict:
    """How a model can be trained.

    scale, softcap: what it does to the logits of its head, as ``from_hidden`` takes them.
    unfusable: why its logits must be kept in full, or empty.
    other_loss: what its own loss is where that is not the mean cross-entropy of each next token, or empty.
    unknown: why its own loss could not be looked at, or empty.
    """

    scale: float = 1.0
    softcap: float | None = None
    unfusable: str = ""
    other_loss: str = ""
    unknown: str = ""


@dataclass
class _Trial:
    """What came of a forward with labels of ours."""

    labels: Tensor | None
    outputs: Any = None
    failed: str = ""
    verdict: Verdict = Verdict()

    @property
    def comparable(self) -> bool:
        """Its loss is that of its logits and labels."""
        if self.labels is None or self.outputs is None:
            return False
        logits = self.outputs.get("logits")
        return logits is not None and logits.shape[:-1] == self.labels.shape


def inspected(
    tap: HeadTap, run: Callable[..., Any], labels: Tensor, attention_mask: Tensor | None, added: Added
) -> Verdict:
    """A verdict on a model, the same on all ranks. The state of the model and of random numbers stays as it is.

    It follows from the code of the model, the shapes of a batch and its mask; neither weights nor tokens matter.

    Args:
        tap: On the head of the model.
        run: The model's own forward on a batch; takes ``labels``.
        labels: (B, T), those of the batch, for their shape.
        attention_mask: Some models leave out of their loss what it masks, so nothing is labelled there.
    """
    if attention_mask is None or attention_mask.shape != labels.shape:
        attention_mask = torch.ones_like(labels)
    head = tap.find()
    with undisturbed(tap.model):
        if head is None:
            verdict = Verdict(unfusable="get_output_embeddings() of the model gives no head")
            trial = _Trial(None)
        else:
            padding = int((attention_mask != 0).any(0).flip(0).int().argmax())  # columns at the end
            window = _made_up_labels(attention_mask, UNLABELLED + LABELLED + padding, UNLABELLED + 1)
            trial = _on_made_up_logits(tap, run, labels.shape, window, window)
            verdict = trial.verdict
            if not everywhere(not verdict.unfusable, labels.device):  # it may be for the labels
                verdict = _on_made_up_logits(tap, run, labels.shape, window, None).verdict
            if partitioned(head) and not is_linear(head):
                why = "DeepSpeed ZeRO-3 makes the parts of an adapted head whole one after the other"
                verdict = replace(verdict, unfusable=why)
        if not everywhere(trial.comparable, labels.device):
            trial = _on_own_logits(run, _made_up_labels(attention_mask, labels.shape[1], 0))
    if trial.failed:
        verdict = replace(verdict, unknown=f"its forward fails with made-up labels ({trial.failed})")
    elif (own := trial.outputs.get("loss")) is None:
        pass
    elif not trial.comparable:
        verdict = replace(verdict, unknown="its logits are not in line with its labels")
    elif own.isnan().any():
        verdict = replace(verdict, unknown="it is NaN")
    else:
        verdict = replace(verdict, other_loss=_difference(trial, added))
    if not everywhere(not verdict.unfusable, labels.device):
        verdict = replace(verdict, unfusable=verdict.unfusable or ANOTHER)
    if not everywhere(not verdict.other_loss, labels.device):
        verdict = replace(verdict, other_loss=verdict.other_loss or "another process says why")
    return verdict


def processed(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def agree(seen: Tensor, expected: Tensor) -> bool:
    """They differ by the rounding of a few operations."""
    eps = max(torch.finfo(t.dtype).eps for t in (seen, expected))
    # Not every device has float64.
    return torch.allclose(seen.cpu().double(), expected.cpu().double(), rtol=16 * eps, atol=0)


def telling(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Numbers of both signs and of many sizes, which show a scale and a cap."""
    count = math.prod(shape)
    sizes = torch.linspace(-10, 10, count, dtype=statistics_dtype(like.dtype), device=like.device)
    signs = torch.arange(count, device=like.device) % 2 * 2 - 1
    return (signs * 2.0**sizes).view(shape)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model and leave no trace: no gradient, dropout, running statistic or random number."""
    training = [module for module in model.modules() if module.training]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    for module in training:
        module.training = False
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for module in training:
            module.training = True


def _made_up_labels(attention_mask: Tensor, length: int, unlabelled: int) -> Tensor:
    """(B, length), for the last columns of a mask. Never 0 to 2, where padding and other special tokens often are."""
    rows = torch.arange(len(attention_mask), device=attention_mask.device)[:, None]
    columns = torch.arange(length, device=attention_mask.device)
    labels = 3 + (5 * columns + rows) % 7
    labels[:, :unlabelled] = IGNORE_INDEX
    labels[:, unlabelled + 2 : unlabelled + 3] = IGNORE_INDEX
    masked = attention_mask[:, -length:] == 0
    labels[:, labels.shape[1] - masked.shape[1] :][masked] = IGNORE_INDEX
    return labels


def _made_up_logits(shape: torch.Size, like: Tensor) -> Tensor:
    """(B, k, V). In float32 at least, whatever the type of the model, so that a scale is seen as it is."""
    sizes = (shape[1], like.shape[-1])
    # Numbers that look random, the same on every rank and device.
    position = torch.arange(sizes[0] * sizes[1], dtype=torch.float64).view(sizes)
    rows = (2 * torch.sin(position * position % 1000.0)).to(like.device, statistics_dtype(like.dtype))
    rows[0] = SMALL * (1 + torch.linspace(0, 1, sizes[1]))
    rows[1] = LARGE
    rows[2] = telling(rows[2].shape, rows)
    return rows.repeat(shape[0], 1, 1)


def _on_made_up_logits(
    tap: HeadTap, run: Callable[..., Any], shape: torch.Size, window: Tensor, labels: Tensor | None
) -> _Trial:
    """A forward whose head returns made-up logits for the rows of a window."""
    trial = _Trial(labels)
    made: list[Tensor] = []
    called_on: list[tuple[int, ...]] = []

    def take(hidden_states: Tensor, head: Head) -> Tensor:
        called_on.append(tuple(hidden_states.shape[:-1]))
        made.append(_made_up_logits(window.shape, head.forward(hidden_states[..., :1, :])))
        return made[-1].clone()

    def unfusable(why: str) -> _Trial:
        trial.verdict = Verdict(unfusable=why)
        return trial

    try:
        trial.outputs = tap.run(run if labels is None else partial(run, labels=labels), take)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        trial.failed = str(error)
        return unfusable(f"its forward fails without all logits ({error})")
    if len(made) != 1:
        return unfusable(f"its forward calls the head {len(made)} times")
    if called_on[0] != tuple(shape):
        return unfusable(f"its head is called on {called_on[0]} rows where labels are {tuple(shape)}")
    if (fit := _fit(made[0], trial.outputs.logits)) is None:
        return unfusable("it does more to the logits of its head than to scale and to cap them")
    trial.verdict = Verdict(*fit)
    return trial


def _on_own_logits(run: Callable[..., Any], labels: Tensor) -> _Trial:
    try:
        return _Trial(labels, run(labels=labels))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return _Trial(labels, failed=str(error))


def _fit(made: Tensor, seen: Tensor | None) -> tuple[float, float | None] | None:
    """The scale and the softcap that a model applied to made-up logits, or None where it did anything else."""
    if seen is None or seen.shape != made.shape:
        return None
    scale = float((seen[0, 0].cpu().double() / made[0, 0].cpu().double()).mean().to(made.dtype))
    largest = float(seen[0, 1, 0].abs())
    softcap = largest if largest < abs(scale) * LARGE / 2 else None
    return (scale, softcap) if scale and agree(seen, processed(made, scale, softcap)) else None


def _difference(trial: _Trial, added: Added) -> str:
    """How the loss of a model differs from the mean cross-entropy of each next token and what is known to be added."""
    own, logits, labels = trial.outputs.loss, trial.outputs.logits, trial.labels
    assert labels is not None
    logits = logits.to(statistics_dtype(logits.dtype))
    more = added(trial.outputs, logits.device)
    labels = labels.to(logits.device)
    shifted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) + more
    aligned = F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + more
    eps = torch.finfo(logits.dtype).eps, torch.finfo(own.dtype).eps
    # Sums over the vocabulary on both sides, and the rounding of the loss.
    same = partial(torch.allclose, rtol=64 * eps[0] + 4 * eps[1], atol=0)
    if own.numel() == 1 and same(own.cpu().double().view(()), shifted.cpu().double()):
        return ""
    if own.numel() == 1 and same(own.cpu().double().view(()), aligned.cpu().double()):
        return "it takes labels to be in line with the logits, without a shift, as the decoders of encoder-decoders do"
    values = f"{own.tolist():.6g}" if own.numel() == 1 else f"of shape {tuple(own.shape)}"
    return (
        f"on made-up logits its own loss is {values}, where the mean cross-entropy of each next token is "
        f"{float(shifted):.6g}: it adds something that it does not tell, weighs rows, or leaves some out; "
        "where the config has a coefficient of what is added, set that to 0"
    )
