"""Losses of number tokens, from the logits at these tokens: a few columns, with their gradient kept until the pull."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..batch import Chunk
from ..family import Family, Part
from ..gradient import LogitGradient, cotangents
from ..terms import Term
from ..views import View
from ..vocabulary import NumberTokens, number_tokens


class NumberPart(Part):
    columns_only = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._found: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by the number of a chunk
        self._tokens = {term.name: _numbers(term).tensors(self.batch.loss) for term in self.terms}

    def see(self, chunk: Chunk, view: View, first: bool, gradient: bool) -> None:
        if not first:
            return
        labels = self.batch.rows.labels[chunk.rows]
        found = self._found[chunk.number] = []
        for term in self.terms:
            tokens, values = self._tokens[term.name]
            # Any value where the target is no number: such rows are none of the term's.
            target = values[torch.searchsorted(tokens, labels).clamp_max(len(tokens) - 1)]
            here = _numbers(term).below(view.vocab_size)
            tokens, values = tokens[:here], values[:here]
            leaf = view.at(tokens).requires_grad_(self.batch.gradient)
            with torch.set_grad_enabled(self.batch.gradient):
                total = self.batch.row_total(
                    term, chunk.rows, {"number_logits": leaf, "values": values, "target": target}
                )
            if self.batch.gradient:
                found.append((tokens, cotangents(total, [leaf])[0]))

    def pull(self, chunk: Chunk, gradient: LogitGradient) -> None:
        gradient.columns.extend(self._found.pop(chunk.number))


def _numbers(term: Term) -> NumberTokens:
    return next(kept for kept in term.rows.filters if isinstance(kept, NumberTokens))


def _informed(term: Term, tokenizer: Any) -> Term:
    found = number_tokens(tokenizer, term.parameters["max_digits"])
    if not found:
        raise ValueError(
            f"{term.loss.name}.max_digits: the vocabulary has no token that is a number of at most "
            f"{term.parameters['max_digits']} digits"
        )
    return replace(term, rows=term.rows.only(NumberTokens(tuple(found), tuple(found.values()))))


NUMBER = Family(
    name="number",
    words="One value a number token, from the logits of the number tokens.",
    cost="one visit",
    statistics={
        "number_logits": "(n, K) logits at the number tokens, of the rows whose target is one",
        "values": "(K,) the values of the number tokens",
        "target": "(n,) the value of each row's target",
    },
    silent_on="tokens that are no numbers",
    informed=_informed,
    part=NumberPart,
)
