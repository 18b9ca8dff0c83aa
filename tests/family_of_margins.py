"""A family of losses that the package does not know, as somebody else would write it: of the margin of the target.

The margin of a row is the logit of its target less the largest other one.
"""

import torch

from axolotl_cvloss.engine.family import Family, Part


class MarginPart(Part):
    def __init__(self, *args):
        super().__init__(*args)
        n = len(self.batch)
        self.margin, self.cotangent = (self.batch.loss.new_zeros(n) for _ in range(2))
        self.rival = torch.zeros(n, dtype=torch.long, device=self.margin.device)

    def see(self, chunk, view, first, gradient):
        if first:
            logits, labels = view.logits(), self.batch.rows.labels[chunk.rows, None]
            others = logits.scatter(1, labels, -torch.inf)
            largest, self.rival[chunk.rows] = others.max(1)
            self.margin[chunk.rows] = logits.gather(1, labels).squeeze(1) - largest

    def leaves(self, rows):
        self.leaf = self.margin[rows].clone()
        return [self.leaf]

    def total(self, rows, statistics):
        return sum(self.batch.row_total(term, rows, {"margin": self.leaf}) for term in self.terms)

    def take(self, rows, cotangents):
        (self.cotangent[rows],) = cotangents

    def pull(self, chunk, gradient):
        rows = chunk.rows
        dense = self.cotangent.new_zeros(rows.stop - rows.start, self.batch.vocab_size)
        for column, sign in ((self.batch.rows.labels, 1), (self.rival, -1)):
            dense.scatter_add_(1, column[rows, None], sign * self.cotangent[rows, None])
        gradient.dense = dense if gradient.dense is None else gradient.dense + dense


MARGIN = Family(
    name="margin",
    words="One value a token, from how far its logit is above all others.",
    cost="one visit",
    statistics={"margin": "(N,) the logit of each row's target less the largest other one"},
    part=MarginPart,
)


def hinge(margin, distance: float = 1.0):
    """The hinge loss of Crammer and Singer.

    Formula: max(0, distance - (z_y - max_{j != y} z_j))
    """
    return (distance - margin).clamp_min(0)
