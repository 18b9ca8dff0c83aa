"""Which rows count: the causal shift, scopes, documents and masks. Nothing else in the package masks or shifts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

IGNORE_INDEX = -100


class Filter(Protocol):
    """Which rows of a scope a term looks at."""

    def __call__(self, targets: Tensor, input_ids: Tensor | None, documents: Tensor) -> Tensor:
        """(B, T) bool, from the token that each row predicts, the tokens of the input, and their documents."""


@dataclass
class Rows:
    """The rows that some term of an objective looks at, in the order of the batch.

    index: (N,) position of each row among the B * T rows of logits.
    labels: (N,) its target.
    documents: (N,) number of its document; not decreasing.
    scopes: for each scope, (N,) bool, whether the row belongs to it.
    weights: (N,) what the values of a row are multiplied by, or None: all alike.
    """

    index: Tensor
    labels: Tensor
    documents: Tensor
    scopes: dict[str, Tensor]
    weights: Tensor | None = None


def select_rows(
    labels: Tensor,
    *,
    shift: bool = True,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    input_ids: Tensor | None = None,
    scopes: tuple[str, ...] = ("completion",),
    filters: Mapping[str, Filter] | None = None,
    example_weights: Tensor | None = None,
) -> Rows:
    """The rows of a batch that ``scopes`` name.

    A scope is ``completion`` or ``sequence``, or one of them behind which filters stand: ``completion/goldfish``.

    The scope ``completion`` has the rows whose label is not -100; ``sequence`` has in addition every row whose
    next token is not padding, with that token of ``input_ids`` as its label. A row never predicts the first token
    of another document.

    Args:
        labels: (B, T) or (N,), int64; -100 is ignored.
        shift: Row t predicts label t + 1; otherwise labels are aligned with the rows already.
        position_ids: (B, T), or (P, B, T); a document begins where they do not increase in any of the P planes.
        attention_mask: (B, T); 0 is padding. Where documents are numbered 1, 2, ... in it, these are used too.
        input_ids: (B, T), what the model was given (never shifted), for the scope ``sequence`` and for filters.
        filters: The filters by name.
        example_weights: (B,), one an example, or one a token in the shape of the labels.
    """
    labels = torch.atleast_2d(labels).long()
    if attention_mask is not None:
        attention_mask = torch.atleast_2d(attention_mask)
    documents = _documents(labels, position_ids, attention_mask)
    within = torch.zeros_like(labels, dtype=torch.bool)  # the next token is of the same document
    within[:, :-1] = documents[:, 1:] == documents[:, :-1]
    targets = labels.roll(-1, dims=1) if shift else labels
    completion = targets != IGNORE_INDEX
    if shift:
        completion &= within
    sequence = completion
    if any(scope.startswith("sequence") for scope in scopes):
        if input_ids is None:
            raise ValueError("cv_loss: scope: sequence needs input_ids beside the labels")
        tokens = _not_padding(labels, documents, position_ids, attention_mask)
        sequence = completion | (tokens.roll(-1, dims=1) & within)
        targets = torch.where(completion, targets, input_ids.view_as(labels).roll(-1, dims=1))
    index = sequence.flatten().nonzero().squeeze(1)
    masks = {"completion": completion, "sequence": sequence}
    for scope in scopes:
        mask, (_, *names) = masks[scope.split("/")[0]], scope.split("/")
        for name in names:
            mask = mask & filters[name](targets, input_ids, documents)  # type: ignore[index]
        masks[scope] = mask
    return Rows(
        index=index,
        labels=targets.flatten()[index],
        documents=documents.flatten()[index],
        scopes={scope: masks[scope].flatten()[index] for scope in scopes},
        weights=None if example_weights is None else _row_weights(example_weights, labels, shift).flatten()[index],
    )


def _row_weights(weights: Tensor, labels: Tensor, shift: bool) -> Tensor:
    """(B, T), for each row the weight of the token that it predicts."""
    weights = weights.to(labels.device)
    if weights.shape == labels.shape:
        return weights.roll(-1, dims=1) if shift else weights
    if weights.numel() == labels.shape[0] or weights.numel() == labels.shape[1] == labels.numel():
        return weights.reshape(labels.shape[0], -1).expand_as(labels)
    raise ValueError(
        f"cv_loss.example_weights: of shape {tuple(weights.shape)}; expected ({labels.shape[0]},), one an example, or "
        f"{tuple(labels.shape)}, one a token, as packed examples need"
    )


@dataclass(frozen=True)
class Goldfish:
    """Leaves one token in ``k`` out, so that a text is not learnt by heart: always the same ones after the same text.

    A token is left out where a hash of the ``h`` tokens before it is below 1 / k. The first ``h`` tokens of a document
    stay. The hash is ours; it is the same on every machine and in every run.

    Source: Hans et al. 2024, Be like a Goldfish, Don't Memorize!, arXiv:2406.10209
    """

    k: int
    h: int

    def __call__(self, targets: Tensor, input_ids: Tensor | None, documents: Tensor) -> Tensor:
        if input_ids is None:
            raise ValueError("cv_loss: goldfish needs input_ids beside the labels")
        keep = torch.ones_like(targets, dtype=torch.bool)
        if targets.shape[1] < self.h:
            return keep
        # A row t that has the tokens t - h + 1 to t in its own document; the token it predicts is t + 1.
        context = input_ids.view_as(targets).long().unfold(1, self.h, 1)
        whole = documents.unfold(1, self.h, 1)
        whole = whole[..., 0] == whole[..., -1]
        value = torch.zeros_like(context[..., 0])
        for token in context.unbind(-1):
            value = (value * 31 + token + 1) % MODULUS
        for factor in (48271, 69621, 16807):  # spread what is near; each product stays within int64
            value = (value * factor + 11) % MODULUS
        keep[:, self.h - 1 :] = ~(whole & (value < MODULUS // self.k))
        return keep


MODULUS = 2**31 - 1  # a prime


def aligned_labels(labels: Tensor, shift: bool) -> Tensor:
    """Labels (B, T) in line with the rows of logits, as the paper's code has them."""
    labels = torch.atleast_2d(labels).long()
    if not shift:
        return labels
    aligned = labels.roll(-1, dims=1)
    aligned[:, -1:] = IGNORE_INDEX
    return aligned


def _documents(labels: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    """The number of each token's document, (B, T), rising through the batch."""
    starts = torch.zeros_like(labels, dtype=torch.bool)
    starts[:, :1] = True
    if position_ids is not None:
        # Multimodal models have planes for time, height and width; within an image only some of them increase.
        planes = position_ids if position_ids.dim() == 3 else torch.atleast_2d(position_ids)[None]
        planes = planes.expand(-1, *labels.shape)
        starts[:, 1:] |= (planes[:, :, 1:] <= planes[:, :, :-1]).all(0)
    if attention_mask is not None and attention_mask.shape == labels.shape:
        starts[:, 1:] |= attention_mask[:, 1:] != attention_mask[:, :-1]
    return starts.flatten().cumsum(0).view_as(labels) - 1


def _not_padding(
    labels: Tensor, documents: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None
) -> Tensor:
    if attention_mask is not None:
        if attention_mask.shape != labels.shape:
            raise ValueError(
                f"cv_loss: scope: sequence needs an attention_mask of shape {tuple(labels.shape)}, "
                f"not {tuple(attention_mask.shape)}"
            )
        return attention_mask > 0
    if position_ids is None:
        return torch.ones_like(labels, dtype=torch.bool)
    # Packed without a mask: the padding is a document of its own, and nothing in it is labelled. Nothing else tells it
    # from a document without labels, and where that stands in a row must not matter.
    labelled = torch.zeros(documents.numel(), dtype=torch.bool, device=labels.device)
    labelled[documents[labels != IGNORE_INDEX]] = True
    return labelled[documents]
