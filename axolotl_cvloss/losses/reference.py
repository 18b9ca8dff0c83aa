"""The five losses as the paper's own code computes them, its slips included (`reference: true`).

Rege Cambrin et al., "Beyond Accuracy Optimization", Findings of EMNLP 2024, arXiv 2409.13641. These are for
replicating the paper; for anything else use the defaults, which differ where a docstring below says "Slip".

Shapes, for every function: logits (B, T, V); labels (B, T), already aligned with the logits, -100 = ignored.
Each returns a scalar that autograd can differentiate.

All but cross_entropy share one slip. Ignored rows are not dropped: they become rows with all-zero logits
(lovasz: all-zero probabilities) and label 0, and count as such in every mean and sum. They pass no gradient
to the logits, but they add constants, enlarge denominators and make token 0 a class. The correct form drops
them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def _wide(logits: Tensor) -> Tensor:
    """float32 at least: the paper's logits are float32, and the 1e20 below is beyond fp16."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _blank_ignored(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The shared slip: zero the scores of ignored rows and call them class 0."""
    ignored = labels == IGNORE_INDEX
    return scores.masked_fill(ignored.unsqueeze(-1), 0.0), labels.masked_fill(ignored, 0)


def _target_logp(logits: Tensor, labels: Tensor) -> Tensor:
    """log p of the target of every row, ignored rows included: there it is -log V."""
    logits, labels = _blank_ignored(_wide(logits), labels)
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean of -log p over the rows that are not ignored, all documents of the batch together.

    No slip. As in torch, a batch without any trained row gives nan.
    """
    logits, labels = _wide(logits).flatten(0, -2), labels.flatten()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing)


def focal(logits: Tensor, labels: Tensor, gamma: float = 2.0, alpha: float = 1.0) -> Tensor:
    """Mean of -alpha (1-p)^gamma log p over all B*T rows.

    Slip: each ignored row adds alpha (1 - 1/V)^gamma log V, a constant, and the mean divides by all rows,
    so more ignored rows shrink the gradient. Correct: the mean over trained rows.
    """
    logp = _target_logp(logits, labels)
    return (-alpha * (1 - logp.exp()) ** gamma * logp).mean()


def self_adjusting_dice(logits: Tensor, labels: Tensor, alpha: float = 1.0, smooth: float = 1.0) -> Tensor:
    """Mean of 1 - (2q + smooth)/(q + 1 + smooth), q = (1-p)^alpha p, over all B*T rows.

    Slip: each ignored row adds the constant of p = 1/V and the mean divides by all rows. Correct: the mean
    over trained rows. (The paper's code calls smooth "gamma".)
    """
    p = _target_logp(logits, labels).exp()
    q = (1 - p) ** alpha * p
    return (1 - (2 * q + smooth) / (q + 1 + smooth)).mean()


def generalized_dice(logits: Tensor, labels: Tensor, smooth: float = 1e-5) -> Tensor:
    """Per row of the batch -2 (sum_c w_c I_c + smooth)/(sum_c w_c (S_c + N_c) + smooth), then the plain mean.

    Slips, each with its correct form:
    - w_c = 1/(N_c + 1e-10)^2 runs over all V classes, so an absent class weighs 1e20 and drowns the others:
      unless the batch row holds every token of the vocabulary, value and gradient are 0 to about 1e-20.
      Correct: the classes present in the labels.
    - ignored rows count into class 0, and 1/V of each into every S_c. Correct: they are dropped.
    - there is no "1 -", so values run from about -1 to 0, and smooth is doubled in the numerator.
      Correct: 1 - (2 sum_c w_c I_c + smooth)/(...).
    - sets are rows of the batch, each with the same weight.
      Correct: a set is a document, weighted by its trained tokens.
    """
    logits, labels = _blank_ignored(_wide(logits), labels)
    p = logits.softmax(-1)
    target = torch.zeros_like(p).scatter(-1, labels.unsqueeze(-1), 1.0)
    count = target.sum(1)
    weight = 1 / (count + 1e-10) ** 2
    intersection = (weight * (p * target).sum(1)).sum(-1)
    total = (weight * (p.sum(1) + count)).sum(-1)
    return (-2 * (intersection + smooth) / (total + smooth)).mean()


def lovasz(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over classes of the Lovasz extension of the Jaccard loss, the whole batch as one set.

    Slips: token 0 becomes a class as soon as one row is ignored, and in it every ignored row is a member
    with p = 0, the largest error there is. (In other classes an ignored row is background with error 0 and
    changes nothing.) Correct: ignored rows are dropped, and a set is a document.
    """
    p, labels = _blank_ignored(_wide(logits).softmax(-1), labels)
    p, labels = p.flatten(0, -2), labels.flatten()
    present = labels.unique()
    member = labels.unsqueeze(-1) == present
    p = p[:, present]
    errors, order = torch.where(member, 1 - p, p).sort(dim=0, descending=True)
    member = member.gather(0, order).to(p.dtype)
    # Jaccard loss once the k rows with the largest errors count as wrong; its steps weigh the sorted errors.
    hits = member.cumsum(0)
    size = hits[-1]
    jaccard = 1 - (size - hits) / (size + torch.arange(1, len(p) + 1, device=p.device).unsqueeze(-1) - hits)
    steps = torch.cat([jaccard[:1], jaccard.diff(dim=0)])
    return (errors * steps).sum(0).mean()
