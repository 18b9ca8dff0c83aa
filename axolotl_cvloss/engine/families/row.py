"""Losses of one row, from all its logits: autograd differentiates them on a chunk at a time."""

import torch

from ..batch import Chunk
from ..family import Family, Part
from ..gradient import LogitGradient
from ..views import View


class RowPart(Part):
    revisits = True

    def see(self, chunk: Chunk, view: View, first: bool, gradient: bool) -> None:
        leaf = view.logits().detach().requires_grad_(gradient)
        given = {"logits": leaf, "labels": self.batch.rows.labels[chunk.rows]}
        with torch.set_grad_enabled(gradient):
            total = self.batch.loss.new_zeros(())
            for term in self.terms:
                total = total + self.batch.row_total(term, chunk.rows, given, report=first)
        if gradient:
            (self._dense,) = torch.autograd.grad(total, leaf)

    def pull(self, chunk: Chunk, gradient: LogitGradient) -> None:
        gradient.dense = self._dense if gradient.dense is None else gradient.dense + self._dense
        del self._dense


ROW = Family(
    name="row",
    words="One value a token, from all its logits.",
    cost="one visit, with autograd",
    statistics={
        "logits": "(N, V) logits of some rows, float32 or float64",
        "labels": "(N,) their targets",
    },
    part=RowPart,
)
