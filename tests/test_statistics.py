"""Numbers of a row from all its logits: value and gradient are those of autograd on their formulas."""

import math

import pytest
import torch
from helpers import DEVICE, temporary_losses

from axolotl_cvloss import Objective, register_loss
from axolotl_cvloss.engine import batch as engine_batch
from axolotl_cvloss.engine import sources, statistics

N, H, V = 9, 5, 23

# Once more, from the definitions: of the logits z (n, V), the targets y and the parameter.
DEFINITIONS = {
    "mean_logit": lambda z, y, a: z.mean(1),
    "mean_logp": lambda z, y, a: z.log_softmax(1).mean(1),
    "vocab_size": lambda z, y, a: torch.full((len(z),), V),
    "possible": lambda z, y, a: torch.full((len(z),), V),
    "height": lambda z, y, a: z[torch.arange(len(z)), y] - z.mean(1),
    "variance": lambda z, y, a: (z**2).mean(1) - z.mean(1) ** 2,
    "other_squares": lambda z, y, a: (z**2).sum(1) - z[torch.arange(len(z)), y] ** 2,
    "target_logit": lambda z, y, a: z[torch.arange(len(z)), y],
    "tempered_odds": lambda z, y, a: odds_at(z, y, a),
    "tempered_lead": lambda z, y, a: ((z.detach() / a).softmax(1) * z).sum(1) - z[torch.arange(len(z)), y],
    "sparse_depth": lambda z, y, a: z.detach().amax(1) - (z - projected(z)).detach().amax(1),
    "sparse_max": lambda z, y, a: (
        (projected(z) * z).sum(1) - (projected(z) ** 2).sum(1) / 2 - z[torch.arange(len(z)), y]
    ),
    "own_temperature": lambda z, y, a: temperature_of(z, *a),
    "own_tempered_odds": lambda z, y, a: odds_at(z, y, temperature_of(z, *a)[:, None]),
    "other_powers": lambda z, y, a: (others_of(z, y, z.softmax(1) ** a * z.log_softmax(1))).sum(1),
    "other_power_mass": lambda z, y, a: (others_of(z, y, z.detach().softmax(1) ** a)).sum(1),
    "accuracy": lambda z, y, a: (z.argmax(1) == y).double(),
    "entropy": lambda z, y, a: -(z.softmax(1) * z.log_softmax(1)).sum(1),
    "collision": lambda z, y, a: (z.softmax(1) ** 2).sum(1),
    "top_entropy": lambda z, y, a: entropy_of(z.detach().sort(1, descending=True).values[:, : int(a)]),
    "top_mass": lambda z, y, a: z.detach().softmax(1).sort(1, descending=True).values[:, : int(a)].sum(1),
}
PARAMETERS = {
    "tempered_odds": 1.7,
    "tempered_lead": 1.7,
    "own_temperature": (0.8, 1.5),
    "own_tempered_odds": (0.8, 1.5),
    "other_powers": 1.3,
    "other_power_mass": 1.3,
    "top_entropy": 4.0,
    "top_mass": 3.0,
}


def entropy_of(z):
    return -(z.softmax(1) * z.log_softmax(1)).sum(1)


PULLED = [
    *("entropy", "collision", "tempered_odds", "own_tempered_odds", "variance", "height", "other_powers"),
    *("tempered_lead", "sparse_max"),
]


def projected(z):
    """The distribution nearest to each row, by bisection of what is taken from all logits; a constant.

    <q, z> - |q|^2 / 2 is largest at it, so that q may count as one.
    """
    z = z.detach()
    low, high = z.amax(1, keepdim=True) - 1, z.amax(1, keepdim=True)
    for _ in range(100):
        middle = (low + high) / 2
        above = (z - middle).clamp_min(0).sum(1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (z - low).clamp_min(0)


def others_of(z, y, x):
    return x * (1 - torch.nn.functional.one_hot(y, z.shape[1]))


def odds_at(z, y, temperature):
    scaled = z / temperature
    others = scaled.masked_fill(torch.nn.functional.one_hot(y, z.shape[1]).bool(), -torch.inf)
    return others.logsumexp(1) - scaled[torch.arange(len(z)), y]


def temperature_of(z, temperature, alpha):
    entropy = entropy_of(z.detach() / temperature)
    return temperature * (1 - (math.log(z.shape[1]) - entropy) / (alpha * math.log(z.shape[1])))


def test_every_statistic_has_a_definition_here():
    assert set(DEFINITIONS) == set(statistics.STATISTICS)


def loss_of(name):
    """A loss of one statistic beside log p, and its formula."""

    def weighted(logp, number):
        return number**2 * 0.1 - logp * number.tanh()

    at = PARAMETERS.get(name, ())
    at = at if isinstance(at, tuple) else (at,)
    parameters = ", ".join(f"at_{number}: float = {value}" for number, value in enumerate(at))
    source = f"def function(logp, {name}, {parameters}): return weighted(logp, {name})"
    scope = {"weighted": weighted}
    exec(source, scope)  # an argument is what a statistic is asked for by
    return scope["function"], weighted


def registered(name):
    function, weighted = loss_of(name)
    at = {name: ("at_0", "at_1") if isinstance(PARAMETERS[name], tuple) else "at_0"} if name in PARAMETERS else None
    register_loss("mine", family="token", at=at)(function)
    return weighted


@pytest.mark.parametrize("rows", [2, 100])
@pytest.mark.parametrize("others", [{}, {"lovasz": 0.5}, {"dice": 0.2, "by_autograd": 0.3}], ids=str)
@pytest.mark.parametrize("name", DEFINITIONS)
def test_value_and_gradient(name, others, rows, monkeypatch):
    """Fused, in chunks, beside families of two visits and of autograd, with a trained head and with a frozen one."""
    monkeypatch.setitem(engine_batch.CHUNK_BYTES, DEVICE.type, rows * V * 8)
    monkeypatch.setattr(statistics, "BLOCK_BYTES", V * 8)
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (2 * torch.randn(s, H, generator=generator, dtype=torch.float64) for s in (N, V))
    labels = torch.randint(0, V, (N,), generator=generator)
    hidden.requires_grad_()
    with temporary_losses():
        weighted = registered(name)
        register_loss("by_autograd", family="row")(lambda logits, labels: logits.square().mean(1))
        objective = Objective.from_config({"mine": 0.7, **others})
        for trained in (True, False):
            wanted = (hidden, weight.requires_grad_()) if trained else (hidden,)
            weight.requires_grad_(trained)
            result = objective.from_hidden(hidden, weight, labels, shift=False)
            found = torch.autograd.grad(result.loss, wanted)
            z = hidden @ weight.T
            logp = z.log_softmax(1)[torch.arange(N), labels]
            value = weighted(logp, DEFINITIONS[name](z, labels, PARAMETERS.get(name, 1.0))).mean()
            torch.testing.assert_close(result.terms["mine"], value.detach())
            expected = 0.7 * value
            if others:
                expected = expected + Objective.from_config(others).from_logits(z, labels, shift=False).loss
            torch.testing.assert_close(found, torch.autograd.grad(expected, wanted))


def steered(logp, entropy):
    """The entropy is a constant where that of all rows is small."""
    return -logp * (entropy if float(entropy.detach().max()) > 1 else entropy.detach())


@pytest.mark.parametrize(
    ("name", "once"),
    [("focal", True), ("idft", True), ("deft", True), ("confidence_penalty", False), ("steered", False)],
)
def test_a_frozen_head_is_read_once_beside_constants(name, once, monkeypatch):
    """What a term detaches takes no second visit of the logits; what turns out to be no constant does."""
    monkeypatch.setitem(engine_batch.CHUNK_BYTES, DEVICE.type, 3 * V * 8)
    seen, affine = [], sources.LinearSource._affine
    monkeypatch.setattr(
        sources.LinearSource, "_affine", lambda self, rows: seen.extend(range(N)[rows]) or affine(self, rows)
    )
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(s, H, generator=generator, dtype=torch.float64) for s in (N, V))
    hidden[:3] *= 20  # the first chunk is sure
    hidden.requires_grad_()
    labels = torch.randint(0, V, (N,), generator=generator)
    with temporary_losses():
        register_loss("steered", family="token")(steered)
        objective = Objective.from_config({name: 0.7, "dice": 0.3})
        loss = objective.from_hidden(hidden, weight, labels, shift=False).loss
    dice = Objective.from_config({"dice": 0.3}).from_logits(hidden @ weight.T, labels, shift=False).loss
    if name == "steered":
        logp = (hidden @ weight.T).log_softmax(1)[torch.arange(N), labels]
        alone = 0.7 * steered(logp, entropy_of(hidden @ weight.T)).mean()
    else:
        alone = Objective.from_config({name: 0.7}).from_logits(hidden @ weight.T, labels, shift=False).loss
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), torch.autograd.grad(alone + dice, hidden))
    assert (len(seen) == N) == once


@pytest.mark.parametrize("name", PULLED)
def test_float32_loses_no_more_than_torch(name):
    """With a common offset and confident rows, beside autograd of the formula in float32."""
    generator = torch.Generator().manual_seed(5)
    logits = 8 * torch.randn(64, V, generator=generator, dtype=torch.float64) + 1000
    labels = logits.argmax(1)
    with temporary_losses():
        weighted = registered(name)

        def gradients(dtype):
            leaf = logits.float().to(dtype).requires_grad_()
            loss = Objective.from_config("mine").from_logits(leaf, labels, shift=False).loss
            ours = torch.autograd.grad(loss, leaf)[0]
            logp = leaf.log_softmax(1)[torch.arange(64), labels]
            torchs = weighted(logp, DEFINITIONS[name](leaf, labels, PARAMETERS.get(name, 1.0))).mean()
            return ours.double(), torch.autograd.grad(torchs, leaf)[0].double()

        exact, _ = gradients(torch.float64)
        ours, torchs = gradients(torch.float32)
    largest = exact.abs().max()
    assert (ours - exact).abs().max() <= 3 * (torchs - exact).abs().max() + largest * V * torch.finfo(torch.float32).eps


OF_ALL_TOKENS = ("mean_logit", "mean_logp", "vocab_size", "own_temperature", "own_tempered_odds")  # ruled out or not


@pytest.mark.parametrize(
    ("name", "at"),
    [*((name, {}) for name in DEFINITIONS if name not in OF_ALL_TOKENS), ("other_powers", {"at_0": 0.0})],
)
def test_a_token_that_is_ruled_out_is_as_if_it_were_not_there(name, at):
    logits = 2 * torch.randn(N, V, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    more = torch.cat([logits, torch.full((N, 2), -torch.inf)], 1)
    labels = torch.arange(N)
    with temporary_losses():
        registered(name)
        objective = Objective.from_config({"mine": {"weight": 1.0, **at}})
        (wanted, expected), (value, gradient) = (
            (loss.detach(), *torch.autograd.grad(loss, leaf))
            for leaf in (logits.requires_grad_(), more.requires_grad_())
            for loss in [objective.from_logits(leaf, labels, shift=False).loss]
        )
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(gradient, torch.nn.functional.pad(expected, (0, 2)))


def test_terms_share_a_statistic_and_differ_in_its_parameter():
    def at_one(tempered_odds, temperature: float = 1.0):
        return torch.nn.functional.softplus(tempered_odds)

    logits = torch.randn(N, V, dtype=torch.float64)
    labels = torch.arange(N)
    with temporary_losses():
        register_loss("tempered", family="token", at={"tempered_odds": "temperature"})(at_one)
        terms = [{"loss": "tempered", "temperature": t} for t in (1.0, 2.0, 2.0)]
        result = Objective.from_config({"terms": terms}).from_logits(logits, labels, shift=False)
    expected = [float(-(logits / t).log_softmax(1)[torch.arange(N), labels].mean()) for t in (1.0, 2.0, 2.0)]
    assert [float(value) for value in result.terms.values()] == pytest.approx(expected)
    assert math.isclose(expected[0], float(result.nll))


@pytest.mark.parametrize("at", [{"entropy": "beta"}, {"lse": "beta"}])
def test_a_parameter_that_is_not_there(at):
    with pytest.raises(ValueError, match="at maps statistics of the loss to parameters of it"):
        register_loss("mine", family="token", at=at)(lambda entropy, gamma=1.0: entropy)
