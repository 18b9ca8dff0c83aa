"""Which rows count. Rows are written as (position in the batch, label), one batch a test, worked out by hand."""

import pytest
import torch
from helpers import BATCHES, make_batch

from axolotl_cvloss.engine.rows import COMPLETION, SEQUENCE, Selector, aligned_labels, select_rows

X = -100
BOTH = (COMPLETION, SEQUENCE)


def tensor(*lines):
    return torch.tensor(lines)


def rows(labels, scope="completion", **inputs):
    """[(position, label), ...] of a scope, and their documents, numbered from 0 as they come."""
    selectors = (COMPLETION,) if scope == "completion" else BOTH
    found = select_rows(labels, selectors=selectors, **inputs)
    assert len(found.index) == len(found.labels) == len(found.documents)
    assert (found.documents.diff() >= 0).all()
    chosen = found.scopes[Selector(scope)]
    documents = found.documents[chosen].unique(return_inverse=True)[1]
    pairs = zip(found.index[chosen].tolist(), found.labels[chosen].tolist(), strict=True)
    return list(pairs), documents.tolist()


# The shift


def test_a_row_predicts_the_next_label():
    assert rows(tensor([5, X, 7, 8])) == ([(1, 7), (2, 8)], [0, 0])


def test_the_last_row_predicts_nothing_of_the_next_line():
    assert rows(tensor([X, 5, 6], [7, 8, X])) == ([(0, 5), (1, 6), (3, 8)], [0, 0, 1])


def test_aligned_labels_are_taken_as_they_are():
    assert rows(tensor([5, X, 7, 8]), shift=False) == ([(0, 5), (2, 7), (3, 8)], [0, 0, 0])


def test_labels_of_one_dimension():
    labels = torch.tensor([5, X, 7])
    assert rows(labels) == ([(1, 7)], [0])
    assert rows(labels, shift=False) == ([(0, 5), (2, 7)], [0, 0])
    assert rows(labels, position_ids=torch.tensor([0, 1, 0])) == ([], [])
    assert rows(labels, "sequence", input_ids=torch.tensor([5, 6, 7])) == ([(0, 6), (1, 7)], [0, 0])


@pytest.mark.parametrize("shift", [True, False])
def test_all_masked(shift):
    labels = tensor([X, X, X], [X, X, X])
    assert rows(labels, shift=shift) == ([], [])
    assert rows(labels, "sequence", input_ids=torch.ones_like(labels), position_ids=torch.arange(3), shift=shift) == (
        [],
        [],
    )


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3), (2, 1)])
def test_nothing_to_predict(shape):
    labels = torch.ones(shape, dtype=torch.long)
    for more in ({}, {"position_ids": torch.zeros_like(labels)}, {"attention_mask": torch.ones_like(labels)}):
        assert rows(labels, **more) == ([], [])
        assert rows(labels, "sequence", input_ids=labels, **more) == ([], [])


def test_the_labels_are_left_as_they_were():
    labels = tensor([5, X, 7])
    select_rows(labels, input_ids=tensor([5, 6, 7]), selectors=BOTH)
    assert labels.tolist() == [[5, X, 7]]


def test_aligned_labels_of_the_papers_code():
    assert aligned_labels(tensor([5, X, 7]), shift=True).tolist() == [[X, 7, X]]
    assert aligned_labels(torch.tensor([5, X, 7]), shift=False).tolist() == [[5, X, 7]]


# Documents


def test_lines_are_documents():
    assert rows(tensor([X, 5], [X, 6]))[1] == [0, 1]


def test_position_ids_restart_at_each_document():
    labels, position_ids = tensor([1, 2, 3, 4, 5, 6, 7]), tensor([0, 1, 2, 0, 0, 1, 2])
    # 4 and 5 are first tokens, and 4 is a document of its own, so nothing predicts them.
    assert rows(labels, position_ids=position_ids) == ([(0, 2), (1, 3), (4, 6), (5, 7)], [0, 0, 1, 1])


def test_aligned_rows_of_documents():
    labels, position_ids = tensor([1, 2, 3, 4, 5]), tensor([0, 1, 2, 0, 1])
    found = rows(labels, position_ids=position_ids, shift=False)
    assert found == ([(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)], [0, 0, 0, 1, 1])


def test_one_line_of_position_ids_serves_all():
    labels = tensor([1, 2, 3, 4], [5, 6, 7, 8])
    for position_ids in (torch.tensor([0, 1, 0, 1]), tensor([0, 1, 0, 1])):
        assert rows(labels, position_ids=position_ids) == ([(0, 2), (2, 4), (4, 6), (6, 8)], [0, 1, 2, 3])


def test_positions_that_do_not_start_at_0():
    # As with a cache of earlier tokens, or where positions are counted from 2.
    assert rows(tensor([1, 2, 3, 4]), position_ids=tensor([2, 3, 2, 3])) == ([(0, 2), (2, 4)], [0, 1])


def test_numbered_masks():
    labels, mask = tensor([1, 2, 3, 4, 5, X]), tensor([1, 1, 2, 2, 2, 0])
    wanted = [(0, 2), (2, 4), (3, 5)], [0, 1, 1]
    assert rows(labels, attention_mask=mask) == wanted
    # With squash_position_ids Axolotl's collator counts on over the documents.
    assert rows(labels, attention_mask=mask, position_ids=tensor([0, 1, 2, 3, 4, 0])) == wanted


def test_masks_of_other_shapes_are_the_models_own_business():
    labels = tensor([1, 2, 3])
    assert rows(labels, attention_mask=torch.ones(1, 1, 3, 3)) == ([(0, 2), (1, 3)], [0, 0])
    with pytest.raises(ValueError, match=r"attention_mask of shape \(1, 3\), not \(1, 1, 3, 3\)"):
        rows(labels, "sequence", input_ids=labels, attention_mask=torch.ones(1, 1, 3, 3))


def test_planes_of_position_ids():
    # Qwen2-VL: two words, an image of 2 x 2 patches (time, height, width), two words; then a second document.
    position_ids = torch.tensor(
        [
            [[0, 1, 2, 2, 2, 2, 4, 5, 0, 1]],
            [[0, 1, 2, 2, 3, 3, 4, 5, 0, 1]],
            [[0, 1, 2, 3, 2, 3, 4, 5, 0, 1]],
        ]
    )
    labels = tensor([1, 2, X, X, X, X, 7, 8, 9, 10])
    wanted = [(0, 2), (5, 7), (6, 8), (8, 10)], [0, 0, 0, 1]
    assert rows(labels, position_ids=position_ids) == wanted
    # With a fourth plane in front that counts the tokens of the text, as transformers makes it.
    text = torch.tensor([[[0, 1, 2, 3, 4, 5, 6, 7, 0, 1]]])
    assert rows(labels, position_ids=torch.cat([text, position_ids])) == wanted


# Padding


def test_padding_on_the_right():
    labels, mask = tensor([X, 2, 3, X, X], [X, 5, 6, 7, 8]), tensor([1, 1, 1, 0, 0], [1, 1, 1, 1, 1])
    wanted = [(0, 2), (1, 3), (5, 5), (6, 6), (7, 7), (8, 8)], [0, 0, 1, 1, 1, 1]
    assert rows(labels) == rows(labels, attention_mask=mask) == wanted


def test_padding_on_the_left():
    labels, mask = tensor([X, X, 1, 2, 3]), tensor([0, 0, 1, 1, 1])
    # A label of the first token counts, as in models' own losses: of its document, though the row is padding.
    assert rows(labels, attention_mask=mask) == ([(1, 1), (2, 2), (3, 3)], [0, 0, 0])
    assert rows(tensor([X, X, X, 2, 3]), attention_mask=mask) == ([(2, 2), (3, 3)], [0, 0])
    # transformers numbers the padding of a left-padded line 1. Without a mask it may be documents of one token.
    assert rows(labels, position_ids=tensor([1, 1, 0, 1, 2]), attention_mask=mask)[0] == [(1, 1), (2, 2), (3, 3)]
    assert rows(labels, position_ids=tensor([1, 1, 0, 1, 2])) == ([(2, 2), (3, 3)], [0, 0])


def test_labelled_padding():
    """Where padding is the end of text too, and a collator has left its label."""
    labels, mask = tensor([1, 2, 9, X], [9, 9, 1, 2]), tensor([1, 1, 0, 0], [0, 0, 1, 1])
    assert rows(labels, attention_mask=mask) == ([(0, 2), (1, 9), (4, 9), (5, 1), (6, 2)], [0, 0, 1, 2, 2])


# The scope "sequence"


def test_sequence_takes_the_prompt_too():
    labels, input_ids = tensor([X, X, 3, 4, X]), tensor([1, 2, 3, 4, 5])
    wanted = [(0, 2), (1, 3), (2, 4), (3, 5)], [0, 0, 0, 0]
    assert rows(labels, "sequence", input_ids=input_ids) == wanted
    assert rows(labels, "sequence", input_ids=input_ids, attention_mask=torch.ones_like(labels)) == wanted


def test_both_scopes_share_their_rows():
    labels, input_ids = tensor([X, X, 3, X]), tensor([1, 2, 3, 4])
    found = select_rows(labels, input_ids=input_ids, selectors=BOTH)
    assert found.index.tolist() == [0, 1, 2]
    assert found.labels.tolist() == [2, 3, 4]
    assert found.scopes[COMPLETION].tolist() == [False, True, False]
    assert found.scopes[SEQUENCE].tolist() == [True, True, True]


def test_a_label_goes_before_the_token():
    # Where a collator has put another target in, that is what is trained.
    assert rows(tensor([X, 9, X]), "sequence", input_ids=tensor([1, 2, 3])) == ([(0, 9), (1, 3)], [0, 0])


def test_sequence_leaves_out_padding_by_the_mask():
    labels, input_ids = tensor([X, X, 3, X, X]), tensor([1, 2, 3, 0, 0])
    found = rows(labels, "sequence", input_ids=input_ids, attention_mask=tensor([1, 1, 1, 0, 0]))
    assert found == ([(0, 2), (1, 3)], [0, 0])
    left = rows(
        tensor([X, X, X, 2, 3]), "sequence", input_ids=tensor([0, 0, 1, 2, 3]), attention_mask=tensor([0, 0, 1, 1, 1])
    )
    assert left == ([(2, 2), (3, 3)], [0, 0])


@pytest.mark.parametrize("padding", [[0, 1, 2], [0, 0, 0]], ids=["range", "zeros"])
def test_sequence_leaves_out_the_tail_of_a_packed_line_without_a_mask(padding):
    # Axolotl's collators pad position_ids with range(), which looks like one document more; TRL pads with zeros.
    labels, input_ids = tensor([X, 2, X, 4, X, X, X]), tensor([1, 2, 3, 4, 0, 0, 0])
    found = rows(labels, "sequence", input_ids=input_ids, position_ids=tensor([0, 1, 0, 1, *padding]))
    assert found == ([(0, 2), (2, 4)], [0, 1])


@pytest.mark.parametrize("padding", [[0, 1, 2], [0, 0, 0]], ids=["range", "zeros"])
def test_sequence_leaves_out_the_tail_of_a_packed_line_whose_mask_says_nothing(padding):
    # So Axolotl's streamed packing gives it. A last prompt without an answer is no padding: it repeats no token.
    labels, given = tensor([X, 2, X, 4, X, X, X]), {"position_ids": tensor([0, 1, 0, 1, *padding])}
    given["attention_mask"] = torch.ones_like(labels)
    found = rows(labels, "sequence", input_ids=tensor([1, 2, 3, 4, 0, 0, 0]), **given)
    assert found == ([(0, 2), (2, 4)], [0, 1])
    prompt = rows(labels, "sequence", input_ids=tensor([1, 2, 3, 4, 5, 6, 6]), **given)
    assert prompt[0][:2] == found[0]
    assert len(prompt[0]) == (4 if padding[1] else 2)


def test_sequence_in_numbered_masks():
    labels, input_ids, mask = tensor([X, 2, X, 4, X]), tensor([1, 2, 3, 4, 0]), tensor([1, 1, 2, 2, 0])
    found = rows(labels, "sequence", input_ids=input_ids, attention_mask=mask)
    assert found == ([(0, 2), (2, 4)], [0, 1])


def test_a_prompt_without_an_answer():
    labels, input_ids = tensor([X, X, X, 4]), tensor([1, 2, 3, 4])
    position_ids = tensor([0, 1, 0, 1])
    # A mask says that its tokens are real. Without one it cannot be told from padding, and is left out.
    whole = rows(labels, "sequence", input_ids=input_ids, position_ids=position_ids, attention_mask=tensor([1] * 4))
    assert whole == ([(0, 2), (2, 4)], [0, 1])
    assert rows(labels, "sequence", input_ids=input_ids, position_ids=position_ids) == ([(2, 4)], [0])


def test_sequence_beside_aligned_labels():
    # shift_labels come with the model's own input_ids: a row of the prompt predicts the next of these.
    aligned, input_ids = tensor([X, 3, 4, X]), tensor([1, 2, 3, 4])
    shifted = rows(tensor([X, X, 3, 4]), "sequence", input_ids=input_ids)
    assert rows(aligned, "sequence", input_ids=input_ids, shift=False) == shifted == ([(0, 2), (1, 3), (2, 4)], [0] * 3)


def test_sequence_needs_input_ids():
    with pytest.raises(ValueError, match="cv_loss: scope: sequence needs input_ids"):
        rows(tensor([X, 1]), "sequence")


# All of it, against the definition


@pytest.mark.parametrize("scope", ["completion", "sequence"])
@pytest.mark.parametrize("kind", BATCHES)
def test_rows_are_those_of_the_definition(kind, scope):
    for seed in range(5):
        batch = make_batch(kind, seed)
        if "input_ids" not in batch.inputs and scope == "sequence":
            continue
        width = batch.labels.shape[-1]
        wanted = batch.rows(scope)
        pairs, documents = rows(batch.labels, scope, **batch.inputs)
        assert pairs == [(b * width + t, target) for (b, t), target, _ in wanted]
        for document in set(documents):  # the same rows stand together, and no row crosses a document
            names = {name for (_, _, name), number in zip(wanted, documents, strict=True) if number == document}
            assert len(names) == 1
        assert len(set(documents)) == len({name for _, _, name in wanted})
