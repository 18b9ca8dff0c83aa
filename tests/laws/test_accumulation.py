"""Micro-batches with a common count are one big batch."""

import itertools

import torch
from helpers import Batch, make_batch
from listed import MIXTURE, close, counted, each_family, evaluate, naive, of_numbers, term
from naive import NUMBERS


def split(batch, sizes):
    """Micro-batches of so many lines each."""
    parts = zip(*(x.split(sizes) for x in (batch.logits, batch.labels, batch.documents)), strict=True)
    lines = {name: x.split(sizes) for name, x in batch.inputs.items()}
    return [Batch(*part, {name: x[i] for name, x in lines.items()}) for i, part in enumerate(parts)]


@each_family("mixture", kind=["padded", "packed"])
def test_micro_batches_with_a_common_count_are_one_big_batch(listed_as, kind):
    batch = make_batch(kind, 12)
    terms = [term(listed_as)] if listed_as != "mixture" else [{**t, "per": "document"} for t in MIXTURE[2:]]
    terms = [*terms, *([{"loss": "cross_entropy", "scope": "sequence"}] if listed_as == "mixture" else [])]
    big, big_gradient = evaluate(batch, *terms)
    counts = {scope: len(batch.rows(scope)) for scope in ("completion", "sequence")}
    if of_numbers(listed_as):
        counts |= counted(listed_as, counts["completion"], sum(y in NUMBERS for _, y, _ in batch.rows()))
    given = [counts, {s: torch.tensor(n) for s, n in counts.items()}]
    if listed_as != "mixture" and not of_numbers(listed_as):
        given += [counts["completion"], torch.tensor(float(counts["completion"]))]
    lines = len(batch.labels)
    for sizes, count in itertools.product(([1] * lines, [1, lines - 1]), given):
        found = [evaluate(part, *terms, num_items_in_batch=count) for part in split(batch, sizes)]
        close(sum(result.loss for result, _ in found), big.loss, 1e-12)
        close(torch.cat([gradient for _, gradient in found]), big_gradient, 1e-12)


def test_the_sets_of_per_batch_are_micro_batches():
    """There the sum is the mean over micro-batches, weighted by their tokens."""
    batch = make_batch("padded", 12)
    one = {"loss": "generalized_dice", "per": "batch"}
    parts = split(batch, [1, 2])
    n = len(batch.rows())
    found = sum(evaluate(part, one, num_items_in_batch=n)[0].loss for part in parts)
    close(found, sum(naive(part, one)[0] * len(part.rows()) for part in parts) / n)


def test_where_only_the_trained_tokens_are_known_a_sequence_term_counts_by_them():
    batch = make_batch("padded", 12)
    one = {"loss": "cross_entropy", "scope": "sequence"}
    n = len(batch.rows())
    found = sum(evaluate(part, one, num_items_in_batch=n)[0].loss for part in split(batch, [1, 1, 1]))
    parts = split(batch, [1, 1, 1])
    close(found, sum(naive(part, one)[0] * len(part.rows()) for part in parts) / n)
