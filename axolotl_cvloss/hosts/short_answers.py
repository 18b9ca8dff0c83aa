"""Answers so short that an overlap is no more than the probability of a token. Imports no host."""

from collections.abc import Iterable

from ..losses.registry import Loss

FEW_TOKENS = 2  # labelled tokens of a document: an answer of one token, and the end of the text


def measures_overlap(loss: Loss, per: str) -> bool:
    """Whether a term measures the overlap of the tokens of each document with what is predicted for them."""
    return loss.per_set and loss.kind.flat and per == "document"


def told(names: Iterable[str], which: str) -> str:
    """What to say of these terms and of documents that are all so short."""
    return (
        f"cv_loss: {which} one labelled token, or two with the end of the text. There the value of "
        f"{' and '.join(sorted(set(names)))} hardly depends on more than p of each token (that of lovasz is 1 - p), so "
        "it is no overlap. With per: batch the micro-batch is one set"
    )
