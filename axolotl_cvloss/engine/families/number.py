"""Losses of number tokens, from the logits at these tokens: a few columns, kept until the pull."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..batch import Chunk
from ..family import Family, Part
from ..gradient import LogitGradient
from ..terms import Term
from ..views import View
from ..vocabulary import NumberTokens, number_tokens


class NumberPart(Part):
    columns_only = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._tokens = [_numbers(term).tensors(self.batch.loss, self.batch.vocab_size) for term in self.terms]
        self._seen: list[list[Tensor]] = [[] for _ in self.terms]  # logits at the tokens, by chunk

    def see(self, chunk: Chunk, view: View, first: bool, gradient: bool) -> None:
        if first:
            for seen, (tokens, _, _) in zip(self._seen, self._tokens, strict=True):
                seen.append(view.at(tokens))

    def leaves(self, rows: slice) -> list[Tensor]:
        self._leaves = [torch.cat(seen) for seen in self._seen]
        self._seen = [[] for _ in self.terms]
        return self._leaves

    def total(self, rows: slice, statistics: Mapping[Any, Tensor]) -> Tensor | float:
        total: Tensor | float = 0.0
        labels = self.batch.rows.labels[rows]
        for term, logits, (tokens, values, forms) in zip(self.terms, self._leaves, self._tokens, strict=True):
            # Any token where the target is no number: such rows are none of the term's.
            own = torch.searchsorted(tokens, labels).clamp_max(len(tokens) - 1)
            given = {"number_logits": logits, "values": values, "target": values[own], "logp": statistics["logp"]}
            if term.needs("alike"):
                given["alike"] = forms == forms[own, None]
            total = total + self.batch.row_total(term, rows, given)
        return total

    def take(self, rows: slice, cotangents: Sequence[Tensor]) -> None:
        self._first, self._cotangents = rows.start, cotangents

    def pull(self, chunk: Chunk, gradient: LogitGradient) -> None:
        rows = slice(chunk.rows.start - self._first, chunk.rows.stop - self._first)
        for (tokens, _, _), cotangent in zip(self._tokens, self._cotangents, strict=True):
            gradient.columns.append((tokens, cotangent[rows]))


def _numbers(term: Term) -> NumberTokens:
    return next(kept for kept in term.rows.filters if isinstance(kept, NumberTokens))


def _informed(term: Term, tokenizer: Any) -> Term:
    found = number_tokens(tokenizer, term.parameters["max_digits"])
    if not found.tokens:
        raise ValueError(
            f"{term.loss.name}.max_digits: the vocabulary has no token that is a number of at most "
            f"{term.parameters['max_digits']} digits"
        )
    return replace(term, rows=term.rows.only(found))


NUMBER = Family(
    name="number",
    words="One value a number token, from the logits of the number tokens.",
    cost="one visit",
    statistics={
        "number_logits": "(n, K) logits at the number tokens, of the rows whose target is one",
        "values": "(K,) the values of the number tokens",
        "target": "(n,) the value of each row's target",
        "alike": "(n, K) bool, whether a token is written as the target is: a space or not, as many zeros before it",
        "logp": "(n,) log-probability of each row's target among all tokens",
    },
    silent_on="tokens that are no numbers",
    informed=_informed,
    part=NumberPart,
)
