"""Which rows count: the causal shift, scopes, documents and masks. Nothing else in the package masks or shifts."""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = -100
SCOPES = ("completion", "sequence")


@dataclass
class Rows:
    """The rows that some term of an objective looks at, in the order of the batch.

    index: (N,) position of each row among the B * T rows of logits.
    labels: (N,) its target.
    documents: (N,) number of its document; not decreasing.
    scopes: for each scope, (N,) bool, whether the row belongs to it.
    """

    index: Tensor
    labels: Tensor
    documents: Tensor
    scopes: dict[str, Tensor]


def select_rows(
    labels: Tensor,
    *,
    shift: bool = True,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    input_ids: Tensor | None = None,
    scopes: tuple[str, ...] = ("completion",),
) -> Rows:
    """The rows of a batch that ``scopes`` name.

    The scope ``completion`` has the rows whose label is not -100; ``sequence`` has in addition every row whose
    next token is not padding, with that token of ``input_ids`` as its label. A row never predicts the first token
    of another document.

    Args:
        labels: (B, T) or (N,), int64; -100 is ignored.
        shift: Row t predicts label t + 1; otherwise labels are aligned with the rows already.
        position_ids: (B, T), or (P, B, T); a document begins where they do not increase in any of the P planes.
        attention_mask: (B, T); 0 is padding. Where documents are numbered 1, 2, ... in it, these are used too.
        input_ids: (B, T), what the model was given (never shifted), for the scope ``sequence``.
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
    if "sequence" in scopes:
        if input_ids is None:
            raise ValueError("cv_loss: scope: sequence needs input_ids beside the labels")
        tokens = _not_padding(labels, documents, position_ids, attention_mask)
        sequence = completion | (tokens.roll(-1, dims=1) & within)
        targets = torch.where(completion, targets, input_ids.view_as(labels).roll(-1, dims=1))
    index = sequence.flatten().nonzero().squeeze(1)
    masks = {"completion": completion, "sequence": sequence}
    return Rows(
        index=index,
        labels=targets.flatten()[index],
        documents=documents.flatten()[index],
        scopes={scope: masks[scope].flatten()[index] for scope in scopes},
    )


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
    # Packed without a mask: the padding at the end is a document of its own, and nothing in it is labelled.
    labelled = torch.zeros(documents.numel(), dtype=torch.bool, device=labels.device)
    labelled[documents[labels != IGNORE_INDEX]] = True
    return labelled[documents]
