"""What does not matter: ignored rows, other documents, the order of rows, how they are cut up and lie in memory."""

from dataclasses import replace

import torch
from helpers import BATCHES, DEVICE, IGNORE, VOCAB, Batch, make_batch
from listed import FAMILIES, MIXTURE, close, counted, each_family, each_loss, evaluate, groupings, objective, term

from axolotl_cvloss.engine import batch as engine_batch


@each_loss(kind=list(BATCHES))
def test_ignored_rows_change_nothing(listed_as, kind):
    batch = make_batch(kind, 3)
    unused = batch.unused()
    assert unused.any()
    for grouping in groupings(listed_as):
        result, gradient = evaluate(batch, term(listed_as, **grouping))
        assert (gradient[unused] == 0).all()
        for noise in (50.0, float("nan")):
            changed = batch.logits.clone()
            changed[unused] = noise * torch.randn(int(unused.sum()), VOCAB, dtype=torch.float64)
            other, other_gradient = evaluate(batch, term(listed_as, **grouping), logits=changed)
            assert torch.equal(other.loss, result.loss)
            assert torch.equal(other_gradient, gradient)
            assert torch.equal(other.nll, result.nll)


@each_loss()
def test_a_neighbouring_document_changes_nothing(listed_as):
    """Packed: the gradient of a document is the same beside any neighbour, and alone."""
    batch = make_batch("packed", 4)
    document = int(batch.documents[0, 7])
    mine = batch.documents == document
    alone = Batch(batch.logits[mine][None], batch.labels[mine][None], batch.documents[mine][None])
    count = counted(listed_as, 20)
    _, wanted = evaluate(alone, term(listed_as), num_items_in_batch=count)

    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        logits, labels = batch.logits.clone(), batch.labels.clone()
        logits[~mine] = torch.randn(int((~mine).sum()), VOCAB, generator=generator, dtype=torch.float64)
        labels[~mine] = torch.randint(0, VOCAB, (int((~mine).sum()),), generator=generator)
        _, gradient = evaluate(replace(batch, labels=labels), term(listed_as), logits=logits, num_items_in_batch=count)
        close(gradient[mine], wanted[0], 1e-12)

    # The neighbours masked, their logits count nowhere.
    labels = batch.labels.where(mine, IGNORE)
    value, gradient = evaluate(replace(batch, labels=labels), term(listed_as), logits=logits)
    close(value.loss, evaluate(alone, term(listed_as))[0].loss, 1e-12)
    assert (gradient[~mine] == 0).all()


@each_loss()
def test_the_order_of_rows_and_documents_changes_nothing(listed_as):
    lengths = [4, 2, 5]
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    batch = make_batch("rows", 5)
    n = sum(lengths)
    batch = Batch(batch.logits[None, :n], batch.labels[None, :n], None, {"shift": False, "position_ids": position_ids})
    parts = torch.arange(n).split(lengths)
    generator = torch.Generator().manual_seed(0)
    shuffled = [part[torch.randperm(len(part), generator=generator)] for part in parts]
    for grouping in groupings(listed_as):
        result, gradient = evaluate(batch, term(listed_as, **grouping))
        for order in ([0, 1, 2], [2, 0, 1]):
            rows = torch.cat([shuffled[i] for i in order])
            positions = torch.cat([torch.arange(lengths[i]) for i in order])[None]
            moved = Batch(
                batch.logits[:, rows], batch.labels[:, rows], None, {"shift": False, "position_ids": positions}
            )
            other, other_gradient = evaluate(moved, term(listed_as, **grouping))
            close(other.loss, result.loss, 1e-12)
            close(other_gradient, gradient[:, rows], 1e-12)


@each_family("mixture")
def test_the_size_of_a_chunk_changes_nothing(listed_as, monkeypatch):
    for kind in ("packed", "padded"):
        batch = make_batch(kind, 6)
        terms = FAMILIES if listed_as == "mixture" else [term(listed_as)]
        n = len(batch.rows("sequence" if listed_as == "mixture" else "completion"))
        found = []
        for rows in (1, 5, n - 1, n, n + 100):
            monkeypatch.setitem(engine_batch.CHUNK_BYTES, DEVICE.type, rows * VOCAB * 8)
            result, gradient = evaluate(batch, *terms)
            found.append((result.loss, gradient, result.nll))
        for other in found[:-1]:
            for a, b in zip(other, found[-1], strict=True):
                close(a, b, 1e-12)


def test_logits_need_not_be_contiguous():
    batch = make_batch("padded", 7)
    wanted, wanted_gradient = evaluate(batch, *MIXTURE)
    for permuted in ((1, 0, 2), (2, 0, 1), (0, 2, 1)):
        back = [permuted.index(i) for i in range(3)]
        logits = batch.logits.permute(permuted).contiguous().permute(back)
        assert not logits.is_contiguous()
        leaf = logits.detach().requires_grad_()
        result = batch.result(objective(*MIXTURE), leaf)
        result.loss.backward()
        assert torch.equal(result.loss, wanted.loss)
        assert torch.equal(leaf.grad, wanted_gradient)
