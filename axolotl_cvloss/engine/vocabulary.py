"""What some losses need to know of the vocabulary: which tokens are numbers, and how often each token is a target."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .rows import IGNORE_INDEX

_SPACES = " \u0120\u2581\u00a0"  # a space, and what byte-level and SentencePiece vocabularies write for one


def number_tokens(tokenizer: Any, max_digits: int) -> dict[int, float]:
    """The tokens that are numbers, with their values.

    A token is a number if, but for spaces before it, it has nothing but the digits 0 to 9, at most ``max_digits`` of
    them. Its value is that of these digits alone: of ``1234`` cut into ``123`` and ``4`` the values are 123 and 4.
    Signs, points and words are no numbers.
    """
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    found = {}
    for token, number in vocabulary.items():
        digits = token.lstrip(_SPACES)
        if digits.isascii() and digits.isdigit() and len(digits) <= max_digits:
            found[number] = float(digits)
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class NumberTokens:
    """The number tokens; as a filter, the rows whose target is one."""

    tokens: tuple[int, ...]
    values: tuple[float, ...]

    def __call__(self, targets: Tensor, input_ids: Tensor | None, documents: Tensor) -> Tensor:
        return torch.isin(targets, torch.tensor(self.tokens, device=targets.device))

    def tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (K,), rising, and their values (K,) in the dtype of a tensor."""
        tokens, values = torch.tensor(self.tokens), torch.tensor(self.values, dtype=like.dtype)
        return tokens.to(like.device, non_blocking=True), values.to(like.device, non_blocking=True)

    def below(self, vocab_size: int) -> int:
        """How many of the tokens a vocabulary of that size has."""
        return bisect_left(self.tokens, vocab_size)


def count_labels(labels: Iterable[Any]) -> Tensor:
    """How often each token is a label, (largest label + 1,)."""
    counts = torch.zeros(0, dtype=torch.long)
    for row in labels:
        row = torch.as_tensor(row).flatten()
        new = torch.bincount(row[row != IGNORE_INDEX])
        longer, shorter = (counts, new) if len(counts) >= len(new) else (new, counts)
        counts = longer.clone()
        counts[: len(shorter)] += shorter
    return counts


# Numbers of each row that come from such counts, not from the logits; they have no gradient.
COUNTED = {
    "rarity": "(N,) (n_min / n_y)^(1/4), n_y how often the target is a label in the training set; no gradient",
    "scarcity": "(N,) n_mean / n_y, n_mean the mean of the counts of the tokens that are a label there; no gradient",
}


def counted(counts: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The numbers of ``COUNTED`` for each label, float64. Tokens that are no label there count as the rarest."""
    counts = torch.cat([counts.to(labels.device, torch.float64), torch.zeros(1, device=labels.device)])
    seen = counts[counts > 0]
    if not len(seen):
        seen = counts.new_ones(1)
    own = counts[labels.clamp_max(len(counts) - 1)].clamp_min(seen.min())
    return {"rarity": (seen.min() / own) ** 0.25, "scarcity": seen.mean() / own}
