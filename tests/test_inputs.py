"""Losses and masks that need more than logits and labels: number tokens, token counts, input ids, example weights."""

import math

import pytest
import torch
from helpers import DEVICE, DIGITS, KNOWN, NUMBER_LOSSES, Tokenizer, dropped_naive, make_batch
from naive import COUNTS, FORMS, NAIVE, NUMBERS

from axolotl_cvloss import Objective
from axolotl_cvloss.engine import batch as engine_batch
from axolotl_cvloss.engine.rows import Goldfish, Selector, select_rows
from axolotl_cvloss.engine.vocabulary import count_labels, counted, number_tokens
from axolotl_cvloss.objective.config import ConfigError, CVLossConfig

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def test_number_tokens():
    one, two = (number_tokens(DIGITS, digits) for digits in (1, 2))
    assert dict(zip(one.tokens, one.values, strict=True)) == NUMBERS
    assert dict(zip(two.tokens, two.values, strict=True)) == {**NUMBERS, 3: 12.0}
    assert [a == b for a in one.forms for b in one.forms] == [FORMS[a] == FORMS[b] for a in NUMBERS for b in NUMBERS]


def test_numbers_are_alike_where_as_much_stands_before_them():
    found = number_tokens(Tokenizer("7", "07", "12", "007", "0", "\u01207", "00", "\u2581\u25817", "\u012007"), 3)
    assert found.values == (7, 7, 12, 7, 0, 7, 0, 7, 7)
    assert [found.forms.index(form) for form in found.forms] == [0, 1, 0, 3, 0, 5, 1, 7, 8]


def test_a_vocabulary_without_numbers_is_refused():
    with pytest.raises(ConfigError, match=r"number_token_mse\.max_digits: the vocabulary has no token"):
        Objective.from_config("number_token_mse", tokenizer=Tokenizer("one", "two"))


@pytest.mark.parametrize("key", [*NUMBER_LOSSES, "ldam", "weighted_cross_entropy"])
def test_what_is_missing_is_said(key):
    what = "tokenizer" if key in NUMBER_LOSSES else "label_counts"
    with pytest.raises(ValueError, match=rf"needs to know more; use Objective.from_config\(..., {what}={what}\)"):
        Objective.from_config(key).from_logits(torch.randn(2, 12), torch.tensor([0, 1]), shift=False)


def data(rows=17, hidden=5, vocab=12):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, hidden, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[3] = -100
    return states, weight, labels


MIXES = {
    "alone": {},
    "beside a token loss": {"focal": 0.5},
    "beside a set loss": {"lovasz": 0.5},
    "beside a row loss": {"squentropy": 0.01, "dice": 0.3},
}


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("source", ["logits", "hidden", "frozen", "module", "softcap"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", NUMBER_LOSSES)
def test_number_losses(name, mix, source, chunk, monkeypatch):
    monkeypatch.setitem(engine_batch.CHUNK_BYTES, DEVICE.type, chunk * 12 * 8)
    states, weight, labels = data()
    states.requires_grad_()
    weight.requires_grad_(source != "frozen")
    objective = Objective.from_config({name: 0.7, **MIXES[mix]}, tokenizer=DIGITS)
    others = Objective.from_config(MIXES[mix]) if MIXES[mix] else None
    logits = states @ weight.T
    options = {}
    if source == "softcap":
        logits, options = 3 * torch.tanh(logits / 3), {"softcap": 3.0}
    if source == "logits":
        result = objective.from_logits(logits, labels, shift=False)
    else:
        head = weight
        if source == "module":
            head = torch.nn.Linear(5, 12, bias=False, dtype=torch.float64)
            head.weight = torch.nn.Parameter(weight.detach().clone())
            head = torch.nn.Sequential(head)
        result = objective.from_hidden(states, head, labels, shift=False, **options)
    numbers = [i for i, label in enumerate(labels.tolist()) if label in NUMBERS]
    assert 2 < len(numbers) < len(labels) - 2
    expected = NAIVE[name](logits, labels)
    torch.testing.assert_close(result.terms[name], expected.detach(), **EXACT)
    assert result.counts[name] == len(numbers)
    total = 0.7 * expected
    if others is not None:
        total = total + others.from_logits(logits, labels, shift=False).loss
    torch.testing.assert_close(result.loss, total, **EXACT)
    wanted = [states, *([weight] if source in ("logits", "hidden", "softcap") else [])]
    right = torch.autograd.grad(total, wanted, retain_graph=True)
    ours = torch.autograd.grad(result.loss, wanted)
    for one, other in zip(ours, right, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_no_number_at_all_is_a_connected_zero():
    states, weight, _ = data()
    states.requires_grad_()
    objective = Objective.from_config("number_token_mse", tokenizer=DIGITS)
    result = objective.from_hidden(states, weight, torch.zeros(17, dtype=torch.long), shift=False)
    result.loss.backward()
    assert result.loss == 0
    assert (states.grad == 0).all()


def gaussian(sigma, labels, numbers="0123456789"):
    """Value and gradient over the digits as tokens, and three words."""
    logits = 2 * torch.randn(len(labels), 13, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tokenizer = Tokenizer("a", "b", *numbers, "c")
    objective = Objective.from_config({"number_token_gaussian": {"sigma": sigma}}, tokenizer=tokenizer)
    leaf = logits.requires_grad_()
    loss = objective.from_logits(leaf, labels, shift=False).loss
    return loss.detach(), torch.autograd.grad(loss, leaf)[0], leaf


def test_the_ends_of_number_token_gaussian():
    labels = torch.tensor([2, 7, 11, 0, 5])  # one is no number
    numbers = labels != 0
    value, gradient, leaf = gaussian(1e-200, labels)
    wanted = torch.nn.functional.cross_entropy(leaf[numbers], labels[numbers])
    torch.testing.assert_close(value, wanted.detach(), **EXACT)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, leaf)[0], **EXACT)
    value, gradient, leaf = gaussian(1e9, labels)
    even = -leaf[numbers].log_softmax(1)[:, 2:12].mean() - math.log(10)
    torch.testing.assert_close(value, even.detach(), **EXACT)
    torch.testing.assert_close(gradient, torch.autograd.grad(even, leaf)[0], **EXACT)


def test_number_token_gaussian_wants_no_other_spelling_of_the_number():
    tokens = ["7", "\u01207", "8", "07", "\u01208"]
    objective = Objective.from_config(
        {"number_token_gaussian": {"max_digits": 2, "sigma": 2.0}}, tokenizer=Tokenizer(*tokens)
    )
    height = math.exp(-1 / 8)  # of "8" where the target is "7"
    wanted = torch.tensor([1, 0, height, 0, 0], dtype=torch.float64) / (1 + height)
    leaf = wanted.clamp_min(1e-300).log()[None].requires_grad_()
    loss = objective.from_logits(leaf, torch.tensor([0]), shift=False).loss
    assert abs(loss.item()) < 1e-12
    assert torch.autograd.grad(loss, leaf)[0].abs().max() < 1e-12


def test_max_digits_is_a_parameter():
    states, weight, labels = data()
    labels[:] = 3  # the token 12
    one, two = (
        Objective.from_config({"number_token_mse": {"max_digits": n}}, tokenizer=DIGITS).from_hidden(
            states, weight, labels, shift=False
        )
        for n in (1, 2)
    )
    assert (one.counts["number_token_mse"], two.counts["number_token_mse"]) == (0, 17)
    with pytest.raises(ConfigError, match="max_digits: must be a whole number"):
        CVLossConfig.parse({"number_token_mse": {"max_digits": 0}})


# ldam


@pytest.mark.parametrize("max_margin", [0.5, 2.0])
@pytest.mark.parametrize("source", ["logits", "hidden"])
def test_ldam(source, max_margin):
    states, weight, labels = data()
    labels[3] = 0
    states.requires_grad_()
    weight.requires_grad_()
    objective = Objective.from_config({"ldam": {"max_margin": max_margin}}, **KNOWN)
    logits = states @ weight.T
    if source == "logits":
        result = objective.from_logits(logits, labels, shift=False)
    else:
        result = objective.from_hidden(states, weight, labels, shift=False)
    assert labels.max() >= len(COUNTS)  # tokens that are no label in the training set
    expected = NAIVE["ldam"](logits, labels, max_margin=max_margin)
    torch.testing.assert_close(result.loss, expected, **EXACT)
    pairs = (torch.autograd.grad(loss, (states, weight), retain_graph=True) for loss in (result.loss, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_ldam_without_margin_is_cross_entropy_and_sure_rows_are_finite():
    logits = torch.tensor([[1e4, 0.0, 0.0], [0.0, -1e4, 0.0]], requires_grad=True)
    labels, counts = torch.tensor([0, 1]), torch.tensor([1, 1, 1])
    small = Objective.from_config({"ldam": {"max_margin": 1e-12}}, label_counts=counts)
    same = Objective.from_config("cross_entropy").from_logits(logits, labels, shift=False)
    torch.testing.assert_close(small.from_logits(logits, labels, shift=False).loss, same.loss)
    loss = Objective.from_config("ldam", label_counts=counts).from_logits(logits, labels, shift=False).loss
    assert loss.isfinite()
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_counts_of_labels():
    counts = count_labels([[-100, 2, 2], torch.tensor([5, -100]), [0], [-100]])
    assert counts.tolist() == [1, 0, 2, 0, 0, 1]
    found = counted(torch.tensor([16, 0, 1]), torch.tensor([0, 1, 2, 7]))
    assert found["rarity"].tolist() == [0.5, 1.0, 1.0, 1.0]
    assert found["scarcity"].tolist() == [8.5 / 16, 8.5, 8.5, 8.5]
    assert [x.tolist() for x in counted(torch.zeros(0), torch.tensor([3])).values()] == [[1.0], [1.0]]


# goldfish


@pytest.mark.parametrize("scope", ["completion", "sequence"])
@pytest.mark.parametrize("kind", ["padded", "padded left", "packed", "packed, numbered mask"])
def test_goldfish_leaves_rows_out(kind, scope):
    batch = make_batch(kind)
    fish = Goldfish(k=2, h=2)
    plain = Selector(scope)
    fished = plain.only(fish)
    rows = select_rows(batch.labels, selectors=(plain, fished), **batch.inputs)
    # Documents as the batch was made with, padding counted as one of them.
    dropped = dropped_naive(batch.inputs["input_ids"], batch.documents, 2, 2).flatten()[rows.index]
    assert dropped.any()
    assert rows.scopes[fished].tolist() == (rows.scopes[plain] & ~dropped).tolist()


def test_goldfish_drops_one_in_k_and_the_same_after_the_same_text():
    ids = torch.randint(0, 50_000, (8, 4000), generator=torch.Generator().manual_seed(0))
    documents = torch.arange(8)[:, None].expand_as(ids)
    for k in (2, 4, 50):
        keep = Goldfish(k, 13)(ids, ids, documents)
        assert (~keep).float().mean().item() == pytest.approx(1 / k, rel=0.1)
        moved = Goldfish(k, 13)(ids.roll(-7, 1), ids.roll(-7, 1), documents)
        assert torch.equal(keep[:, 20:-20], moved[:, 13:-27])
    near = Goldfish(4, 1)(torch.arange(4000)[None], torch.arange(4000)[None], torch.zeros(1, 4000))
    assert (~near).float().mean().item() == pytest.approx(1 / 4, rel=0.1)  # neighbours in the vocabulary too
    assert Goldfish(4, 13)(ids[:, :5], ids[:, :5], documents[:, :5]).all()


@pytest.mark.parametrize("loss", ["cross_entropy", "dice", "lovasz", "squentropy", "topk_cross_entropy"])
def test_goldfish_is_as_if_the_rows_had_no_label(loss):
    batch = make_batch("packed")
    fish = Goldfish(3, 2)
    result = batch.result(Objective.from_config({loss: {"goldfish": {"k": 3, "h": 2}}}), batch.logits.requires_grad_())
    labels = batch.labels.clone()
    dropped = dropped_naive(batch.inputs["input_ids"], batch.documents, fish.k, fish.h).roll(1, dims=1)
    labels[dropped] = -100
    same = Objective.from_config(loss).from_logits(batch.logits, labels, **batch.inputs)
    torch.testing.assert_close(result.loss, same.loss, **EXACT)
    grads = [torch.autograd.grad(r.loss, batch.logits, retain_graph=True)[0] for r in (result, same)]
    torch.testing.assert_close(*grads, **EXACT)
    whole = Objective.from_config(loss).from_logits(batch.logits, batch.labels, **batch.inputs)
    assert result.nll == whole.nll
    assert result.counts[loss] == same.n_tokens < result.n_tokens


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "cv_loss.focal.goldfish: must be true, false, or a mapping such as {k: 4, h: 13}, not 3"),
        ({"k": 1}, "cv_loss.focal.goldfish.k: must be a whole number >= 2"),
        ({"j": 1}, "cv_loss.focal.goldfish.j: unknown field; allowed: k, h"),
    ],
)
def test_goldfish_mistakes(given, message):
    with pytest.raises(ConfigError) as error:
        CVLossConfig.parse({"focal": {"goldfish": given}})
    assert message in str(error.value)


def test_goldfish_in_the_long_form():
    config = CVLossConfig.parse({"focal": {"goldfish": True}, "lovasz": {"goldfish": False}})
    first, second = config.dump()["terms"]
    assert first["goldfish"] == {"k": 4, "h": 13}
    assert "goldfish" not in second
    assert CVLossConfig.parse(config.dump()).dump() == config.dump()
    with pytest.raises(ConfigError, match="knows no goldfish"):
        CVLossConfig.parse({"focal": {"goldfish": True}, "reference": True})


def test_goldfish_needs_input_ids():
    with pytest.raises(ValueError, match="goldfish needs input_ids"):
        Objective.from_config({"focal": {"goldfish": True}}).from_logits(
            torch.randn(1, 20, 7), torch.zeros(1, 20, dtype=torch.long)
        )


# example weights


@pytest.mark.parametrize("form", ["example", "token"])
@pytest.mark.parametrize("loss", ["cross_entropy", "squentropy", "dice", "lovasz", "topk_cross_entropy"])
def test_example_weights(loss, form):
    """The weighted sum of what each example gives alone, over the number of rows."""
    batch = make_batch("padded")
    logits = batch.logits.requires_grad_()
    weights = torch.tensor([0.5, 0.0, 3.0])
    given = weights if form == "example" else weights[:, None].expand(batch.labels.shape)
    objective = Objective.from_config(loss)
    result = batch.result(objective, logits, example_weights=given)
    expected = 0
    for i, weight in enumerate(weights.tolist()):
        inputs = {name: value[i : i + 1] for name, value in batch.inputs.items()}
        alone = objective.from_logits(logits[i : i + 1], batch.labels[i : i + 1], **inputs)
        expected = expected + weight * alone.loss * alone.n_tokens
    expected = expected / result.n_tokens
    torch.testing.assert_close(result.loss, expected, **EXACT)
    grads = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (result.loss, expected)]
    torch.testing.assert_close(*grads, **EXACT)
    torch.testing.assert_close(result.nll, batch.result(objective).nll, **EXACT)


def test_weights_of_one_change_nothing():
    batch = make_batch("packed")
    mix = {"cross_entropy": 0.5, "dice": 0.2, "lovasz": {"weight": 0.3, "per": "batch"}}
    objective = Objective.from_config(mix)
    ones = torch.ones_like(batch.labels, dtype=torch.float32)
    torch.testing.assert_close(
        batch.result(objective, example_weights=ones).loss, batch.result(objective).loss, **EXACT
    )


def test_weights_of_packed_examples():
    batch = make_batch("packed")
    weights = torch.rand(
        int(batch.documents.max()) + 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    objective = Objective.from_config("dice")
    result = batch.result(objective, example_weights=weights[batch.documents])
    expected = 0
    for document in batch.documents.unique().tolist():
        labels = batch.labels.where(batch.documents == document, -100)
        alone = objective.from_logits(batch.logits, labels, **batch.inputs)
        expected = expected + weights[document] * alone.loss * alone.n_tokens / result.n_tokens
    torch.testing.assert_close(result.loss, expected, **EXACT)


def test_wrong_shapes_and_names_of_weights_are_said():
    with pytest.raises(
        ValueError, match=r"example_weights: of shape \(3,\); expected \(2,\), one an example, or \(2, 4\)"
    ):
        Objective.from_config("focal").from_logits(
            torch.randn(2, 4, 7), torch.zeros(2, 4, dtype=torch.long), example_weights=torch.ones(3)
        )
    with pytest.raises(ConfigError, match=r"cv_loss\.example_weights: must be a text, not 3"):
        CVLossConfig.parse({"focal": 1.0, "example_weights": 3})
    assert CVLossConfig.parse({"focal": 1.0, "example_weights": "w"}).dump()["example_weights"] == "w"
