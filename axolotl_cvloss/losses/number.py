"""Losses of number tokens: how far the number that the model expects is from the one that stands there.

They look only at rows whose target is a number token, and their mean is over these rows. Each takes ``number_logits``
(n, K), the logits at the K number tokens, their ``values`` (K,), and the value of each row's ``target`` (n,), float32
or float64, and returns one value a row, (n,).

Which tokens are numbers needs the tokenizer; see ``vocabulary.number_tokens``. With ``max_digits`` 1, the default, only
single digits are, as in the paper and its package. In vocabularies with tokens of up to three digits take 3; each
counts with its own value, wherever it stands in a longer number.
"""

import torch
from torch import Tensor

from .bounds import Number, Positive
from .hookspecs import hookimpl


def number_token_wasserstein(number_logits: Tensor, values: Tensor, target: Tensor, max_digits: Number = 1) -> Tensor:
    """Mean distance from the target's value of the numbers that the model expects.

    Formula: sum_j q_j |v_j - v_y|, q the softmax over the number tokens, v their values
    Source: Zausinger et al. 2024, Regress, Don't Guess, arXiv:2411.02083
    Helps: arithmetic, where a number near the right one is better than one far off. Mix it with cross-entropy.
    Hurts: it says nothing of other tokens, nor of the probability that a number comes at all.

    Args:
        number_logits: (n, K), logits at the number tokens.
        values: (K,), their values.
        target: (n,), the value of each row's target.
        max_digits: Tokens of at most so many digits are numbers.
    """
    q = number_logits.softmax(1)
    return (q * (values - target[:, None]).abs()).sum(1)


def number_token_mse(number_logits: Tensor, values: Tensor, target: Tensor, max_digits: Number = 1) -> Tensor:
    """Squared distance from the target's value of the mean of the numbers that the model expects.

    Formula: (sum_j q_j v_j - v_y)^2, q the softmax over the number tokens, v their values
    Source: Zausinger et al. 2024, Regress, Don't Guess, arXiv:2411.02083
    Helps: as number_token_wasserstein, which its authors found better.
    Hurts: a mean may be right where no number is: 3 and 5 make 4. Values are squares; give it a small weight.

    Args:
        number_logits: (n, K), logits at the number tokens.
        values: (K,), their values.
        target: (n,), the value of each row's target.
        max_digits: Tokens of at most so many digits are numbers.
    """
    # The mean distance, not the mean less the target, which cancels where the model is sure.
    return (number_logits.softmax(1) * (values - target[:, None])).sum(1) ** 2


def number_token_gaussian(
    number_logits: Tensor,
    values: Tensor,
    target: Tensor,
    alike: Tensor,
    logp: Tensor,
    sigma: Positive = 0.5,
    max_digits: Number = 1,
) -> Tensor:
    """Cross-entropy whose target is spread over the numbers near it, by a bell curve around its value.

    Numbers are those that are written as the target is: with a space before them or without, and with as many zeros.

    Formula: -sum_j t_j log p_j - H(t), t_j proportional to exp(-(v_j - v_y)^2 / (2 sigma^2)) over the number tokens,
        v their values, p over all tokens, H(t) the entropy of t
    Source: You et al. 2025, DeQA-Score, arXiv:2501.11561, its soft labels carried over to numbers; sigma ours
    Helps: as number_token_wasserstein, and it trains the probability that a number comes at all. No evidence yet.
    Hurts: exact answers, as a part of the probability is meant for wrong numbers: with sigma 0.5, 0.21.

    Args:
        number_logits: (n, K), logits at the number tokens.
        values: (K,), their values.
        target: (n,), the value of each row's target.
        alike: (n, K), bool, whether a token is written as the target is.
        logp: (n,), log p of the target among all tokens.
        sigma: Width of the bell curve; near 0 it is cross-entropy, a large one spreads the target evenly.
        max_digits: Tokens of at most so many digits are numbers.
    """
    away = (values - target[:, None]) / sigma
    own = alike & (away == 0)
    # The target's own share is 1 / (1 + spread); what is 1 less it near 1 is never formed.
    t = (away**2 / -2).exp().masked_fill(~alike | own, 0)
    spread = t.sum(1)
    t = t / (1 + spread)[:, None]
    entropy = torch.special.entr(t).sum(1) + spread.log1p() / (1 + spread)
    target_logit = number_logits.gather(1, own.long().argmax(1, keepdim=True))
    above = torch.where(t > 0, t * (number_logits - target_logit), 0).sum(1)  # 0 times -inf is 0
    return -logp - above - entropy


@hookimpl
def cvloss_register_losses(register):  # type: ignore[no-untyped-def]
    for function in (number_token_wasserstein, number_token_mse, number_token_gaussian):
        register(function.__name__, family="number")(function)
