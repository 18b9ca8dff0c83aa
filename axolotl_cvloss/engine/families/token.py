"""Losses of one row, from a few numbers of the row."""

from collections.abc import Mapping

from torch import Tensor

from ..family import Family, Part


class TokenPart(Part):
    def total(self, rows: slice, statistics: Mapping[str, Tensor]) -> Tensor | float:
        total: Tensor | float = 0.0
        for term in self.terms:
            total = total + self.batch.row_total(term, rows, statistics)
        return total


TOKEN = Family(
    name="token",
    words="One value a token, from the probability of the target token.",
    cost="one visit",
    statistics={
        "logp": "(N,) log-probability of each row's target",
        "lse": "(N,) logsumexp of each row's logits",
        "mean_logit": "(N,) mean of each row's logits",
        "mean_logp": "(N,) mean of the log-probabilities of all tokens in each row",
        "rarity": "(N,) (n_min / n_y)^(1/4), n_y how often the target is a label in the training set; no gradient",
    },
    pointwise=True,
    part=TokenPart,
)
