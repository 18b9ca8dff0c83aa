"""Losses of one row that look at more of it than log p of the target: at its entropy, its mean, its likeliest tokens.

Each takes numbers of the rows, (N,) each, float32 or float64, and returns one value a row, (N,). The engine collects
the numbers once for all losses, and pulls their gradient back, in a few passes over a chunk of logits.

A logit may be -inf (a token that is ruled out); p log p and the like are 0 there, and means over the vocabulary, as
that of squentropy, leave it out.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.numerics import one_minus_exp
from .bounds import Above1, Fraction, NonNegative, Number, NumberFrom2, Positive, PositiveFraction
from .hookspecs import hookimpl
from .token import focal

CONSTANT = 1e-6  # variance below which a row of logits counts as constant


def deft(logp: Tensor, collision: Tensor) -> Tensor:
    """Between cross-entropy, where the model spreads its probability, and 1 - p, where it is sure: gce with its own q.

    The gradient is sg(p)^a times that of cross-entropy.

    Formula: (1 - p^a) / a, a = sg(sum_j p_j^2), sg without gradient
    Source: Wang et al. 2026, Gradients Must Earn Their Influence, arXiv:2602.11424, its DEFT
    Helps: as dft, but on rows where the model is unsure it learns as cross-entropy does; its authors' experiments.
    Hurts: correcting a model that is sure and wrong, as p is near 0 and a near 1 there. The value is no measure of
        progress.

    Args:
        logp: (N,), log p of the target.
        collision: (N,), sum of the squares of the row's probabilities.
    """
    a = collision.detach()
    return one_minus_exp(a * logp) / a


def brier(logp: Tensor, collision: Tensor) -> Tensor:
    """The squared distance of the row's probabilities from the target: bounded, and proper as cross-entropy is.

    Formula: sum_j (p_j - [j = y])^2 = 1 - 2 p + sum_j p_j^2
    Source: Brier 1950, Verification of Forecasts Expressed in Terms of Probability, Monthly Weather Review 78
    Helps: calibration, and a few wrong labels, as no token costs more than 2. No evidence in fine-tuning yet.
    Hurts: where much is new to the model: the gradient vanishes with p. Mix it with cross-entropy.

    Args:
        logp: (N,), log p of the target.
        collision: (N,), sum of the squares of the row's probabilities.
    """
    return 2 * one_minus_exp(logp) - (1 - collision)


def idft(
    logp: Tensor, entropy: Tensor, beta: Positive = 1.0, low: NonNegative = 0.1, high: NonNegative = 2.0
) -> Tensor:
    """dft with an exponent of each token: small where the target is less likely than the model's entropy suggests.

    log p + H is 0 on average over the model's own samples. Where it is far below, the exponent is ``high`` and the
    token hardly counts; where it is above, the exponent is small and the token counts nearly in full.

    Formula: -sg(p^g) log p, g = clamp(exp(-(log p + H) / beta), low, high), H = -sum_j p_j log p_j, sg without gradient
    Source: Towards On-Policy SFT, 2026, arXiv:2602.12222; one of two copies in its code detaches the whole loss
    Helps: strong base models on data near to what they know; its authors' experiments.
    Hurts: as dft, where much is new to the model; and its value is no measure of progress.

    Args:
        logp: (N,), log p of the target.
        entropy: (N,), of the row's distribution.
        beta: A large one makes it dft.
        low: Least exponent; with ``high`` 0 too it is cross-entropy.
        high: Largest exponent; where it is below ``low`` it is what counts.
    """
    own = logp.detach()
    exponent = (-(own + entropy.detach()) / beta).exp().clamp(low, high)
    return -(exponent * own).exp() * logp


def entropy_adaptive(logp: Tensor, top_entropy: Tensor, alpha: NonNegative = 1.0, k: NumberFrom2 = 20) -> Tensor:
    """Cross-entropy with the model's own uncertainty as weight: where it is sure, right or wrong, it is left alone.

    The uncertainty is the entropy H of the ``k`` likeliest tokens, as a fraction of the largest possible. The paper's
    code divides by 3.0, which is log 20 to 0.2%; Axolotl's ``use_eaft`` does not divide, so its values are about 3
    times as large with alpha 1.

    Formula: -sg(H / log k)^alpha log p, sg without gradient
    Source: Diao et al. 2026, Entropy-Adaptive Fine-Tuning, arXiv:2601.02151
    Helps: keeping what the base model can do, where the data contradict what it is sure of.
    Hurts: correcting a model that is sure and wrong, which it gives up on.

    Args:
        logp: (N,), log p of the target.
        top_entropy: (N,), entropy of the k likeliest tokens among themselves.
        alpha: Power of the uncertainty; 0 is cross-entropy.
        k: How many of the likeliest tokens it is taken from.
    """
    return -((top_entropy.detach() / math.log(k)) ** alpha) * logp


def confidence_penalty(logp: Tensor, entropy: Tensor, coefficient: NonNegative = 0.1) -> Tensor:
    """Cross-entropy with a reward for entropy: the model does not become too sure.

    Formula: -log p - coefficient H, H = -sum_j p_j log p_j
    Source: Pereyra et al. 2017, Regularizing Neural Networks by Penalizing Confident Output Distributions,
        arXiv:1701.06548; the paper tunes the coefficient, default ours
    Helps: small data sets, on which the model would become overconfident, and the diversity of samples.
    Hurts: exact answers, as every other token is kept likelier than the data say.

    Args:
        logp: (N,), log p of the target.
        entropy: (N,), of the row's distribution.
        coefficient: Of the entropy; 0 is cross-entropy.
    """
    return -logp - coefficient * entropy


def tofu(logp: Tensor, tempered_odds: Tensor, gamma: NonNegative = 3.0, temperature: Positive = 0.8) -> Tensor:
    """Cross-entropy at another temperature, with the weight that focal gives to the gradient held constant.

    With temperature 1 the gradient is that of focal; with gamma 0 it is cross-entropy at the temperature, times it.

    Formula: -sg(g) temperature log softmax(z / temperature)_y, g = (1 - p)^gamma - gamma p (1 - p)^(gamma - 1) log p
    Source: Diversity in Large Language Models under Supervised Fine-Tuning, 2026, arXiv:2605.00195
    Helps: the diversity of samples, with a temperature below 1; its authors' experiments.
    Hurts: as focal, with wrong labels; the value is no measure of progress.

    Args:
        logp: (N,), log p of the target.
        tempered_odds: (N,), log-odds against it at the temperature.
        gamma: Weight on tokens that the model gets wrong.
        temperature: Below 1, only tokens nearly as likely as the target are pushed down.
    """
    own = logp.detach()
    wrong = one_minus_exp(own).clamp_min(torch.finfo(own.dtype).tiny)
    # At gamma < 1 the power is large where p is near 1, and log p makes up for it.
    weight = wrong**gamma - gamma * own.exp() * own * wrong ** (gamma - 1)
    return weight * temperature * _softplus(tempered_odds)


def sed(
    logp: Tensor, top_mass: Tensor, coefficient: NonNegative = 1.0, k: Number = 2, threshold: NonNegative = 0.5
) -> Tensor:
    """Cross-entropy, and where the model is unsure a pull of p towards 1/2.

    A row is unsure where its ``k`` likeliest tokens have less probability than the threshold. The paper takes for it a
    quantile over the data under the initial model, which has to be found for each model; the default is ours.

    Formula: -log p + coefficient [m < threshold] (p - 1/2)^2, m the probability of the k likeliest tokens
    Source: SED-SFT, 2026, arXiv:2602.07464; its code has both k 2 and k 10
    Helps: the diversity of samples, where several tokens are right; its authors' experiments.
    Hurts: with a large coefficient, tokens that have one right answer the model does not know yet.

    Args:
        logp: (N,), log p of the target.
        top_mass: (N,), probability of the k likeliest tokens together.
        coefficient: Of the pull; 0 is cross-entropy.
        k: How many tokens are looked at.
        threshold: 0 is cross-entropy; above 1 every row is pulled.
    """
    return coefficient * torch.where(top_mass < threshold, (logp.exp() - 0.5) ** 2, 0) - logp


def squentropy(logp: Tensor, other_squares: Tensor, possible: Tensor, coefficient: NonNegative = 1.0) -> Tensor:
    """Cross-entropy and the mean square of the other tokens' logits, which pulls them to 0.

    Formula: -log p + coefficient / (V - 1) sum_{j != y} z_j^2
    Source: Hui et al. 2023, Cut your Losses with Squentropy, arXiv:2302.03952; coefficient is ours, 1 is the paper's
    Helps: calibration, in models trained from scratch with it.
    Hurts: base models, whose logits were never near 0: most of the gradient moves the logits of unlikely tokens. Take
        a small coefficient. No evidence in fine-tuning yet.

    Args:
        logp: (N,), log p of the target.
        other_squares: (N,), sum of the squares of the other tokens' logits.
        possible: (N,), number of tokens that are not ruled out.
        coefficient: Of the squares; 0 is cross-entropy.
    """
    return coefficient * other_squares / (possible - 1).clamp_min(1) - logp


def spherical_z(height: Tensor, variance: Tensor, slope: Positive = 1.0, offset: float = 10.0) -> Tensor:
    """How many standard deviations the target's logit stands above the mean of its row; no softmax.

    A row whose logits are all equal has no spread; its standard deviation is taken as 0.001.

    Formula: softplus(slope (offset - (z_y - mean z) / std z)) / slope
    Source: de Brebisson and Vincent 2016, The Z-loss, arXiv:1604.08859; the paper tunes slope and offset, defaults ours
    Helps: ranking the target among the first few; shifting or scaling the logits changes nothing.
    Hurts: it does not train probabilities: alone, p and sampling from it drift. No evidence in fine-tuning yet.

    Args:
        height: (N,), the target's logit less the mean of its row.
        variance: (N,), of the row's logits.
        slope: Of the softplus; a large one makes it a hinge.
        offset: Standard deviations that the target is wanted above the mean.
    """
    return _softplus(offset - height / variance.clamp_min(CONSTANT).sqrt(), slope)


def asymmetric(
    logp: Tensor,
    other_powers: Tensor | None,
    vocab_size: Tensor | None,
    gamma_positive: NonNegative = 0.0,
    gamma_negative: NonNegative = 4.0,
    label_smoothing: Fraction = 0.1,
) -> Tensor:
    """Focal with label smoothing, where only tokens that are likely and wrong feel the smoothing.

    Without label smoothing it is focal, which costs less.

    Formula: -(1 - s + s/V) (1 - p)^gamma_positive log p - (s/V) sum_{j != y} p_j^gamma_negative log p_j,
        s = label_smoothing
    Source: Ridnik et al. 2020, Asymmetric Loss for Multi-Label Classification, arXiv:2009.14119, its form for one label
    Helps: in the place of label smoothing; published for images.
    Hurts: with a large vocabulary the second part is all but 0. No evidence in fine-tuning yet.

    Args:
        logp: (N,), log p of the target.
        other_powers: (N,), sum of p_j^gamma_negative log p_j over the other tokens.
        vocab_size: (N,), V in each row.
        gamma_positive: Power of focal, on the target.
        gamma_negative: The same for the other tokens; a large one leaves out those that are unlikely.
        label_smoothing: Share of the uniform distribution in the target.
    """
    value = focal(logp, gamma_positive)
    if other_powers is None or vocab_size is None:
        return value
    share = label_smoothing / vocab_size
    return (1 - label_smoothing + share) * value - share * other_powers


def ldr(tempered_odds: Tensor, vocab_size: Tensor, temperature: Positive = 1.0, margin: NonNegative = 0.1) -> Tensor:
    """Cross-entropy with a temperature and a margin (label-distributionally robust, LDR-KL).

    With temperature 1 and margin 0 it is cross-entropy less log V; near temperature 0 it is the hinge loss of the
    strongest other token.

    Formula: temperature log mean_k exp((z_k - z_y + margin [k != y]) / temperature)
    Source: Zhu et al. 2021, Label Distributionally Robust Losses, arXiv:2112.14869; defaults ours
    Helps: a margin above the other tokens; a temperature above 1 counts all wrong tokens more alike.
    Hurts: away from temperature 1 the model's probabilities are those at another temperature. No evidence in
        fine-tuning yet.

    Args:
        tempered_odds: (N,), log-odds against the target at the temperature.
        vocab_size: (N,), V in each row.
        temperature: Near 0 the strongest other token alone counts.
        margin: How far the target's logit is wanted above the others.
    """
    return temperature * (_softplus(tempered_odds + margin / temperature) - vocab_size.log())


def aldr(
    own_tempered_odds: Tensor,
    own_temperature: Tensor,
    vocab_size: Tensor,
    alpha: Above1 = 2.0,
    temperature: Positive = 1.0,
    margin: NonNegative = 0.1,
) -> Tensor:
    """ldr at a temperature of each row: lower where the model is sure, so that the strongest other tokens count.

    The temperature lies between ``temperature (1 - 1 / alpha)``, of a row with one likely token, and ``temperature``,
    of a row in which all are equally likely. The authors divide the logits by the mean of their sizes first and take 10
    for the temperature; ours are raw, as other losses' are.

    Formula: lam log mean_k exp((z_k - z_y + margin [k != y]) / lam),
        lam = sg(temperature (1 - KL(softmax(z / temperature) || uniform) / (alpha log V))), sg without gradient
    Source: Zhu et al. 2021, Label Distributionally Robust Losses, arXiv:2112.14869, its ALDR-KL; defaults ours
    Helps: as ldr; published for noisy labels, in images and tables.
    Hurts: as ldr; and its value is no measure of progress, as the temperature moves. No evidence in fine-tuning yet.

    Args:
        own_tempered_odds: (N,), log-odds against the target at the temperature of its row.
        own_temperature: (N,), this temperature.
        vocab_size: (N,), V in each row.
        alpha: A large one makes it ldr.
        temperature: Of a row in which all tokens are equally likely.
        margin: How far the target's logit is wanted above the others.
    """
    own = own_temperature.detach()
    return own * (_softplus(own_tempered_odds + margin / own) - vocab_size.log())


def gem(tempered_lead: Tensor, beta: PositiveFraction = 0.7) -> Tensor:
    """Moves probability to the target from the likely tokens alone, which keeps the rest of the distribution.

    Its gradient is q less the target, where cross-entropy has p less the target; beta 1 is cross-entropy's gradient.
    The paper's form with h linear; its code has a second one, with the weights sigmoid(0.01 (z_j - z_y)).

    Formula: -log p + sum_j q_j log p_j, q = sg(softmax(log p / beta)), sg without gradient
    Source: Li et al. 2024, Preserving Diversity in Supervised Fine-Tuning, arXiv:2408.16673
    Helps: keeping the diversity of answers, as a cold start for reinforcement learning or for sampling many.
    Hurts: where one exact answer is wanted, little is known. The value falls below 0 and is no measure of progress.

    Args:
        tempered_lead: (N,), sum of q_j z_j, less the target's logit: log p is z - lse, and q sums to 1.
        beta: Temperature of q; a small one takes from the likeliest tokens alone.
    """
    return tempered_lead


def sparsemax(sparse_max: Tensor) -> Tensor:
    """The loss of sparsemax, a softmax with exact zeros: 0 as soon as the target's logit is 1 above all others.

    Its gradient is q less the target, where cross-entropy has p less the target.

    Formula: <q, z> - z_y + (1 - |q|^2) / 2, q the projection of z onto the simplex
    Source: Martins and Astudillo 2016, From Softmax to Sparsemax, arXiv:1602.02068
    Helps: where answers are meant to be sampled with sparsemax; tokens with a margin of 1 train no more.
    Hurts: models that are sampled with softmax, which all hosts do: a margin of 1 is little there. Mix it with
        cross-entropy. No evidence in fine-tuning yet.

    Args:
        sparse_max: (N,), <q, z> - |q|^2 / 2, less the target's logit.
    """
    return sparse_max + 0.5


def _softplus(x: Tensor, slope: float = 1.0) -> Tensor:
    """log(1 + exp(slope x)) / slope, in float64 too."""
    return F.softplus(x, beta=slope, threshold=40)


@hookimpl
def cvloss_register_losses(register):  # type: ignore[no-untyped-def]
    for function in (deft, brier, idft, confidence_penalty, squentropy, spherical_z, sparsemax):
        register(function.__name__, family="token")(function)
    register("entropy_adaptive", family="token", at={"top_entropy": "k"})(entropy_adaptive)
    register("sed", family="token", at={"top_mass": "k"})(sed)
    register("tofu", family="token", at={"tempered_odds": "temperature"})(tofu)
    register("gem", family="token", at={"tempered_lead": "beta"})(gem)
    register("ldr", family="token", at={"tempered_odds": "temperature"})(ldr)
    own = dict.fromkeys(("own_temperature", "own_tempered_odds"), ("temperature", "alpha"))
    register("aldr", family="token", at=own)(aldr)
    smoothing = dict.fromkeys(("other_powers", "vocab_size"), "label_smoothing")
    at = {"other_powers": "gamma_negative"}
    register("asymmetric", family="token", only_if=smoothing, at=at)(asymmetric)
