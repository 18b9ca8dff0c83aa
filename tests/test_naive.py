"""The naive versions themselves: numbers worked out by hand, and one loss in terms of another."""

import math

import pytest
import torch
import torch.nn.functional as F
from naive import NAIVE, NUMBERS, lovasz_extension, project_on_simplex


def from_probabilities(*rows):
    return torch.tensor(rows, dtype=torch.float64).log().requires_grad_()


def random_rows(n=12, vocabulary=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, vocabulary, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, vocabulary - 2, (n,), generator=generator)  # the last two classes stay absent
    return logits.requires_grad_(), labels


def same(a, b):
    """Equal values and equal gradients: pairs of functions of logits."""
    for seed in range(3):
        logits, labels = random_rows(seed=seed)
        labels[3] = -100
        x, y = a(logits, labels), b(logits, labels)
        torch.testing.assert_close(x, y)
        torch.testing.assert_close(*(torch.autograd.grad(v, logits)[0] for v in (x, y)))


# Rows p = (1/4, 3/4) with label 0 and p = (1/2, 1/2) with label 1.
TWO_ROWS = (0.25, 0.75), (0.5, 0.5)
BY_HAND = {
    "cross_entropy": [
        ({}, (math.log(4) + math.log(2)) / 2),
        # 0.9 log 4 + 0.1 (log 4 + log 4/3)/2, and log 2
        ({"label_smoothing": 0.1}, (0.95 * math.log(4) + 0.05 * math.log(4 / 3) + math.log(2)) / 2),
    ],
    "focal": [({}, (9 / 16 * math.log(4) + 1 / 4 * math.log(2)) / 2)],
    # q = 3/16 and 1/4: 1 - (22/16)/(35/16) = 13/35, 1 - (3/2)/(9/4) = 1/3
    "self_adjusting_dice": [({}, (13 / 35 + 1 / 3) / 2)],
    # I = 1/4, 1/2; S = 3/4, 5/4; N = 1, 1: 1 - 2 * (3/4)/4
    "generalized_dice": [({"smooth": 0.0}, 5 / 8)],
    # Class 0: errors 3/4 (member), 1/2: steps 1, 0. Class 1: 3/4 (other), 1/2 (member): steps 1/2, 1/2.
    "lovasz": [({}, (3 / 4 + 5 / 8) / 2)],
    # 1 - (2/4 + 1)/(3/4 + 1 + 1) = 5/11, 1 - (1 + 1)/(5/4 + 1 + 1) = 5/13
    "dice": [({}, (5 / 11 + 5 / 13) / 2)],
    # 1 - (1/4)/(3/4 + 1 - 1/4) = 5/6, 1 - (1/2)/(5/4 + 1 - 1/2) = 5/7
    "jaccard": [({"smooth": 0.0}, (5 / 6 + 5 / 7) / 2)],
    # Class 0: I 1/4, false alarms 1/2, misses 3/4. Class 1: 1/2, 3/4, 1/2.
    "tversky": [
        (
            {"alpha": 0.2, "beta": 0.6, "smooth": 0.0},
            1 - (0.25 / (0.25 + 0.1 + 0.45) + 0.5 / (0.5 + 0.15 + 0.3)) / 2,
        )
    ],
    "topk_cross_entropy": [({"k": 0.5}, math.log(4))],
    "poly": [({"epsilon": 2.0}, (math.log(4) + math.log(2)) / 2 + 3 / 4 + 1 / 2)],
    # P = 1/8: 1 - (7/8)^3
    "direct_coverage": [({"n": 3}, -math.log(1 - (7 / 8) ** 3))],
    # p <= 3/8: log 3/4; above: log 5/8 - (1/8)/(5/8)
    "encouraging": [
        (
            {"log_end": 3 / 8},
            (math.log(4) + math.log(2) + math.log(3 / 4) + math.log(5 / 8) - 1 / 5) / 2,
        )
    ],
    "confidence_penalty": [
        (
            {"coefficient": 0.5},
            (math.log(4) - 0.5 * (math.log(4) / 4 + 0.75 * math.log(4 / 3)) + math.log(2) - 0.5 * math.log(2)) / 2,
        )
    ],
    # p_ref 1/2 and 1/4: -p log p and k3 with e^r = 2 and 1/2
    "anchored": [
        (
            {"coefficient": 3.0, "reference": [0.5, 0.25]},
            (math.log(4) / 4 + 3 * (1 - math.log(2)) + math.log(2) / 2 + 3 * (math.log(2) - 1 / 2)) / 2,
        )
    ],
    "prior_weighted": [({"reference": [0.5, 0.25]}, (math.log(4) / 2 + math.log(2) / 4) / 2)],
    # The product of p is 1/8, that of p_ref 1/32: the weight is sqrt(4).
    "importance_weighted": [
        ({"reference": [0.125, 0.25]}, 2 * (math.log(4) + math.log(2)) / 2),
        ({"reference": [0.125, 0.25], "cap": 1.5}, 1.5 * (math.log(4) + math.log(2)) / 2),
    ],
    "dft": [({}, (math.log(4) / 4 + math.log(2) / 2) / 2)],
    "thresholded": [
        ({"threshold": 0.3}, math.log(2) / 2),
        ({"threshold": 0.3, "keep": "below"}, math.log(4) / 2),
    ],
    # 9/16 + 9/16, and 1/4 + 1/4
    "brier": [({}, (9 / 8 + 1 / 2) / 2)],
    # a = 1/16 + 9/16 and 1/2
    "deft": [({}, ((1 - 0.25 ** (5 / 8)) / (5 / 8) + (1 - math.sqrt(0.5)) / 0.5) / 2)],
    # g = 3/4 + log(4)/4 and 1/2 + log(2)/2; at temperature 1/2 p is 1/10 and 1/2
    "tofu": [
        (
            {"gamma": 1.0, "temperature": 0.5},
            ((3 / 4 + math.log(4) / 4) * math.log(10) / 2 + (1 / 2 + math.log(2) / 2) * math.log(2) / 2) / 2,
        )
    ],
    # the likeliest token has 3/4 and 1/2
    "sed": [({"k": 1, "threshold": 0.6, "coefficient": 8.0}, (math.log(4) + math.log(2)) / 2)],
    # log p + H is 0 in the second row, so its exponent is 1; 3/4 log 1/3 = -0.82 in the first, and 3^(3/4) is above 2
    "idft": [({}, (math.log(4) / 16 + math.log(2) / 2) / 2)],
    "unlikelihood": [({}, (math.log(4 / 3) + math.log(2)) / 2)],
    # counts 1 and 3, mean 2: weights sqrt 2, and 2 cut to 1.2
    "weighted_cross_entropy": [
        ({"counts": [1, 3]}, (math.sqrt(2) * math.log(4) + math.sqrt(2 / 3) * math.log(2)) / 2),
        ({"counts": [1, 3], "power": 1.0, "cap": 1.2}, (1.2 * math.log(4) + 2 / 3 * math.log(2)) / 2),
    ],
    # H = log 2 for the second row, so with k = 2 its weight is 1
    "entropy_adaptive": [
        (
            {"k": 2},
            (math.log(4) * (math.log(4) / 4 + 0.75 * math.log(4 / 3)) / math.log(2) + math.log(2)) / 2,
        )
    ],
}


@pytest.mark.parametrize(("name", "parameters", "wanted"), [(k, *v) for k, rows in BY_HAND.items() for v in rows])
def test_by_hand(name, parameters, wanted):
    value = NAIVE[name](from_probabilities(*TWO_ROWS), torch.tensor([0, 1]), **parameters)
    assert value.item() == pytest.approx(wanted)


@pytest.mark.parametrize("name", NAIVE)
def test_ignored_rows_change_nothing(name):
    logits, labels = random_rows()
    kept = torch.tensor([0, 1, 2, 5, 6, 7, 8, 11])
    ignored = torch.full_like(labels, -100)
    ignored[kept] = labels[kept]
    documents = torch.arange(len(labels)) // 4
    a = NAIVE[name](logits, ignored, documents)
    b = NAIVE[name](logits[kept], labels[kept], documents[kept])
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(*(torch.autograd.grad(v, logits)[0] for v in (a, b)))


@pytest.mark.parametrize("name", NAIVE)
def test_nothing_to_train_is_a_connected_zero(name):
    logits, labels = random_rows()
    value = NAIVE[name](logits, torch.full_like(labels, -100))
    value.backward()
    assert value == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("name", NAIVE)
def test_documents_are_weighted_by_their_trained_rows(name):
    logits, labels = random_rows()
    labels[4] = -100
    documents = torch.tensor([0] * 3 + [1] * 9)
    first, second = (NAIVE[name](logits[documents == d], labels[documents == d]) for d in (0, 1))
    counts = 3, 8
    if name.startswith("number_token"):  # these look at numbers alone
        counts = [sum(y in NUMBERS for y in labels[documents == d].tolist()) for d in (0, 1)]
        assert 0 < counts[0] < counts[1]
    expected = (counts[0] * first + counts[1] * second) / sum(counts)
    torch.testing.assert_close(NAIVE[name](logits, labels, documents), expected)


def test_number_token_gaussian_by_hand():
    # p = (1/4, 3/4) of two numbers that lie 1 apart; sigma^2 1 / (2 log 3), so t = (3/4, 1/4) and (1/4, 3/4)
    given = {"numbers": {0: 4.0, 1: 5.0}, "forms": {0: "", 1: ""}, "sigma": math.sqrt(1 / (2 * math.log(3)))}
    logits = from_probabilities((0.25, 0.75), (0.25, 0.75))
    value = NAIVE["number_token_gaussian"](logits, torch.tensor([0, 1]), **given)
    assert value.item() == pytest.approx((3 / 4 * math.log(3) + 1 / 4 * math.log(1 / 3)) / 2)


DETACHED = {
    "anchored",
    "aldr",
    "deft",
    "dft",
    "entropy_adaptive",
    "gem",
    "idft",
    "importance_weighted",
    "tofu",
}  # their gradient is not that of their value, on purpose


@pytest.mark.parametrize("name", sorted(set(NAIVE) - DETACHED))
def test_gradient_is_that_of_the_value(name):
    logits, labels = random_rows(6, 5)
    torch.autograd.gradcheck(lambda z: NAIVE[name](z, labels, torch.tensor([0, 0, 0, 1, 1, 1])), (logits,))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("tversky alpha=.5 beta=.5 smooth=1", "dice smooth=2"),
        ("tversky alpha=1 beta=1 smooth=1", "jaccard smooth=1"),
        ("focal_tversky gamma=1", "tversky"),
        ("focal gamma=0", "cross_entropy"),
        ("focal gamma=2 alpha=1", "asymmetric gamma_positive=2 label_smoothing=0"),
        (
            "asymmetric gamma_positive=0 gamma_negative=0 label_smoothing=.1",
            "cross_entropy label_smoothing=.1",
        ),
        ("poly epsilon=0", "cross_entropy"),
        ("topk_cross_entropy k=1", "cross_entropy"),
        ("squentropy coefficient=0", "cross_entropy"),
        ("z_regularized coefficient=0", "cross_entropy"),
        ("confidence_penalty coefficient=0", "cross_entropy"),
        ("dft beta=0", "cross_entropy"),
        ("entropy_adaptive alpha=0", "cross_entropy"),
        ("unified_focal focal_weight=0 delta=.7 gamma=.75", "focal_tversky"),
    ],
)
def test_one_loss_in_terms_of_another(a, b):
    def call(text):
        name, *parameters = text.split()
        values = {key: float(value) for key, value in (p.split("=") for p in parameters)}
        return lambda logits, labels: NAIVE[name](logits, labels, **values)

    same(call(a), call(b))


def trained(logits, labels):
    return logits[labels != -100], labels[labels != -100]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_torchs(smoothing):
    same(
        lambda z, y: NAIVE["cross_entropy"](z, y, label_smoothing=smoothing),
        lambda z, y: F.cross_entropy(z, y, label_smoothing=smoothing),
    )


def test_gce_lies_between_cross_entropy_and_mean_absolute_error():
    logits, labels = random_rows()
    ce, near = NAIVE["cross_entropy"](logits, labels), NAIVE["gce"](logits, labels, q=1e-7)
    assert near.item() == pytest.approx(ce.item(), rel=1e-5)
    same(
        lambda z, y: NAIVE["gce"](z, y, q=1.0),
        lambda z, y: (1 - trained(z, y)[0].softmax(1).gather(1, trained(z, y)[1][:, None])).mean(),
    )


def test_ldr_without_margin_is_cross_entropy_less_log_v():
    same(
        lambda z, y: NAIVE["ldr"](z, y, temperature=1.0, margin=0.0),
        lambda z, y: NAIVE["cross_entropy"](z, y) - math.log(z.shape[1]),
    )


def test_log_cosh_dice_is_log_cosh_of_dice():
    same(
        lambda z, y: NAIVE["log_cosh_dice"](z, y, smooth=0.5),
        lambda z, y: NAIVE["dice"](z, y, smooth=0.5).cosh().log(),
    )


def test_jaccard_metric_is_jaccard_on_hard_labels():
    same(NAIVE["jaccard_metric"], lambda z, y: NAIVE["jaccard"](z, y, smooth=0.0))


def test_generalized_dice_of_one_class_is_dice():
    logits, labels = random_rows()
    labels[:] = 2
    a = NAIVE["generalized_dice"](logits, labels, smooth=0.0)
    torch.testing.assert_close(a, NAIVE["dice"](logits, labels, smooth=0.0))


def test_direct_coverage_of_one_draw_is_the_documents_nll():
    same(
        lambda z, y: NAIVE["direct_coverage"](z, y, n=1),
        lambda z, y: NAIVE["cross_entropy"](z, y) * (y != -100).sum(),
    )


def test_detached_weight_changes_the_gradient_alone():
    # Past p = 1/2 the plain form pushes p down; the detached one still pushes it up.
    logits = from_probabilities((0.9, 0.1))
    for detach, sign in ((False, 1), (True, -1)):
        value = NAIVE["self_adjusting_dice"](logits, torch.tensor([0]), detach_weight=detach)
        assert value.item() == pytest.approx(1 - (2 * 0.09 + 1) / (0.09 + 2))
        assert torch.autograd.grad(value, logits)[0][0, 0].sign() == sign


def test_gradients_of_dft_and_gem():
    logits, labels = random_rows()
    p = logits.softmax(1).detach()
    onehot = F.one_hot(labels, 7).double()
    n = len(labels)
    (dft,) = torch.autograd.grad(NAIVE["dft"](logits, labels), logits)
    torch.testing.assert_close(dft, (p * onehot).sum(1, keepdim=True) * (p - onehot) / n)
    # gem: -log p adds p - onehot, and sum q log p adds q - p
    (gem,) = torch.autograd.grad(NAIVE["gem"](logits, labels, beta=0.5), logits)
    q = (2 * logits.detach()).softmax(1)
    torch.testing.assert_close(gem, (q - onehot) / n)


def test_entropy_adaptive_takes_the_top_k_alone():
    logits = from_probabilities((0.4, 0.4, 0.1, 0.1))
    value = NAIVE["entropy_adaptive"](logits, torch.tensor([2]), k=2)  # the two largest are equal: weight 1
    assert value.item() == pytest.approx(math.log(10))


def test_lovasz_is_the_jaccard_loss_where_errors_are_0_or_1():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        member = torch.rand(9, generator=generator) < 0.5
        member[0] = True
        errors = (torch.rand(9, generator=generator) < 0.5).double()
        predicted = member ^ errors.bool()
        wanted = 1 - (member & predicted).sum() / (member | predicted).sum()
        assert float(lovasz_extension(errors, member.tolist())) == pytest.approx(wanted.item())


def test_lovasz_on_bermans_order():
    # Errors 0.9 (other), 0.6 (member), 0.5 (other), 0.2 (member); Jaccard losses 1/3, 2/3, 3/4, 1.
    value = lovasz_extension(torch.tensor([0.6, 0.9, 0.2, 0.5]), [True, False, True, False])
    assert float(value) == pytest.approx(0.9 / 3 + 0.6 / 3 + 0.5 / 12 + 0.2 / 4)


def test_sparsemax_projects_and_its_gradient_is_the_projection_less_the_target():
    # (0.6, 0.2, -1): the first two shifted by tau = -0.1
    p = project_on_simplex(torch.tensor([0.6, 0.2, -1.0], dtype=torch.float64))
    torch.testing.assert_close(p, torch.tensor([0.7, 0.3, 0.0], dtype=torch.float64))
    logits = torch.tensor([[0.6, 0.2, -1.0]], dtype=torch.float64, requires_grad=True)
    value = NAIVE["sparsemax"](logits, torch.tensor([0]))
    # 0.42 + 0.06 - 0.6 + (1 - 0.58)/2
    assert value.item() == pytest.approx(0.09)
    (gradient,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(gradient, torch.tensor([[-0.3, 0.3, 0.0]], dtype=torch.float64))
    # A margin of 1 is enough for 0.
    assert NAIVE["sparsemax"](torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([0])) == 0


def test_row_sums():
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    label = torch.tensor([2])
    ce = NAIVE["cross_entropy"](logits, label)
    # the others' squares: 1 + 4, over V - 1 = 2
    torch.testing.assert_close(NAIVE["squentropy"](logits, label, coefficient=0.1), ce + 0.25)
    lse = math.log(sum(math.exp(x) for x in (1, 2, 3)))
    torch.testing.assert_close(NAIVE["z_regularized"](logits, label, coefficient=0.5), ce + 0.5 * lse**2)
    # mean 2, std sqrt(2/3): the target stands at sqrt(3/2)
    wanted = math.log(1 + math.exp(2 * (3 - math.sqrt(1.5)))) / 2
    assert NAIVE["spherical_z"](logits, label, slope=2.0, offset=3.0).item() == pytest.approx(wanted)
    # lam 2, c 1: 2 log[(e^-.5 + e^0 + 1)/3]
    wanted = 2 * math.log((math.exp(-0.5) + 2) / 3)
    assert NAIVE["ldr"](logits, label, temperature=2.0, margin=1.0).item() == pytest.approx(wanted)


def test_unified_focal_by_hand():
    # delta .6, gamma .5. Focal: .6 * mean of sqrt(1-p) * -log p. Regions: .4 on false alarms, .6 on misses.
    focal = 0.6 * (math.sqrt(3 / 4) * math.log(4) + math.sqrt(1 / 2) * math.log(2)) / 2
    first = 1 - 0.25 / (0.25 + 0.4 * 0.5 + 0.6 * 0.75)
    second = 1 - 0.5 / (0.5 + 0.4 * 0.75 + 0.6 * 0.5)
    value = NAIVE["unified_focal"](from_probabilities(*TWO_ROWS), torch.tensor([0, 1]), focal_weight=0.3, smooth=0.0)
    assert value.item() == pytest.approx(0.3 * focal + 0.7 * (math.sqrt(first) + math.sqrt(second)) / 2)
