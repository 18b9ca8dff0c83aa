"""What some losses need to know of the vocabulary: which tokens are numbers, and how often each token is a target."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .rows import IGNORE_INDEX

_SPACES = " \u0120\u2581\u00a0"  # a space, and what byte-level and SentencePiece vocabularies write for one


@dataclass(frozen=True)
class NumberTokens:
    """The number tokens, rising, with their values; as a filter, the rows whose target is one.

    forms: Equal for tokens that differ in their value alone: by spaces and zeros before it.
    """

    tokens: tuple[int, ...]
    values: tuple[float, ...]
    forms: tuple[int, ...]

    def __call__(self, targets: Tensor, input_ids: Tensor | None, documents: Tensor) -> Tensor:
        return torch.isin(targets, torch.tensor(self.tokens, device=targets.device))

    def tensors(self, like: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Those that a vocabulary of that size has, (K,); their values in the dtype of a tensor; their forms."""
        here = bisect_left(self.tokens, vocab_size)
        values = torch.tensor(self.values[:here], dtype=like.dtype)
        found = torch.tensor(self.tokens[:here]), values, torch.tensor(self.forms[:here])
        tokens, values, forms = (x.to(like.device, non_blocking=True) for x in found)
        return tokens, values, forms


def number_tokens(tokenizer: Any, max_digits: int) -> NumberTokens:
    """The tokens that are numbers.

    A token is a number if, but for spaces before it, it has nothing but the digits 0 to 9, at most ``max_digits`` of
    them. Its value is that of these digits alone: of ``1234`` cut into ``123`` and ``4`` the values are 123 and 4.
    Signs, points and words are no numbers.
    """
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    found = []
    for token, number in vocabulary.items():
        digits = token.lstrip(_SPACES)
        if digits.isascii() and digits.isdigit() and len(digits) <= max_digits:
            spaces, zeros = len(token) - len(digits), len(digits) - len(str(int(digits)))
            found.append((number, float(digits), spaces * max_digits + zeros))
    tokens, values, forms = zip(*sorted(found), strict=True) if found else ((), (), ())
    return NumberTokens(tokens, values, forms)


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
