"""Losses of a stranger, so that the laws hold for each family and each statistic whatever is built in."""

import pytest
from helpers import temporary_losses
from listed import STRANGERS
from naive import NAIVE, set_loss

from axolotl_cvloss import register_loss


@pytest.fixture(scope="module", autouse=True)
def _strangers():
    with temporary_losses(), pytest.MonkeyPatch.context() as patch:

        @register_loss("a_row_loss", family="row")
        def a_row_loss(logits, labels, coefficient: float = 1.0):
            target = logits.gather(1, labels[:, None]).squeeze(1)
            squares = (logits**2).sum(1) - target**2
            return logits.logsumexp(1) - target + coefficient * squares / (logits.shape[1] - 1)

        @register_loss("a_document_loss", family="document")
        def a_document_loss(logp, power: float = 2.0):
            return 1 - (power * logp.mean()).exp()

        @register_loss("a_region_loss", family="region")
        def a_region_loss(intersection, predicted, labelled, smooth: float = 1.0):
            return 1 - (2 * intersection + smooth) / (predicted + labelled + smooth)

        @register_loss("a_set_loss", family="region")
        def a_set_loss(intersection, predicted, labelled, smooth: float = 1.0):
            return (1 - (2 * intersection + smooth) / (predicted + labelled + smooth)).mean().cosh().log()

        for name, same in zip(STRANGERS, ("squentropy", "cross_entropy", "dice", "log_cosh_dice"), strict=True):
            patch.setitem(NAIVE, name, NAIVE[same])

        def naive_document_loss(z, y):
            return 1 - NAIVE["cross_entropy"](z, y).mul(-2).exp()

        naive_document_loss.__name__ = "a_document_loss"
        set_loss(naive_document_loss)
        yield
