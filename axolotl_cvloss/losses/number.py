"""Losses of number tokens: how far the number that the model expects is from the one that stands there.

They look only at rows whose target is a number token, and their mean is over these rows. Each takes ``number_logits``
(n, K), the logits at the K number tokens, their ``values`` (K,), and the value of each row's ``target`` (n,), and
returns one value a row, (n,).

Which tokens are numbers needs the tokenizer; see ``vocabulary.number_tokens``. With ``max_digits`` 1, the default, only
single digits are, as in the paper and its package. In vocabularies with tokens of up to three digits take 3; each
counts with its own value, wherever it stands in a longer number.
"""

from torch import Tensor

from .bounds import Number
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


@hookimpl
def cvloss_register_losses(register):  # type: ignore[no-untyped-def]
    for function in (number_token_wasserstein, number_token_mse):
        register(function.__name__, family="number")(function)
