"""The list of losses, and what their laws are written with. Every registered loss is in it; naive.py has its double."""

import torch
from helpers import KNOWN, VOCAB, naive_loss
from sampling import combinations, product

from axolotl_cvloss import Objective, available_losses

# The list. A loss with parameters has variants: at least one, away from its defaults.
VARIANTS = {
    "cross_entropy": [{"label_smoothing": 0.1}],
    "focal": [{"gamma": 0.0}, {"gamma": 0.5, "alpha": 0.25}, {"gamma": 5.0}],
    "self_adjusting_dice": [{"detach_weight": True}, {"alpha": 0.0}, {"alpha": 0.5, "smooth": 0.1}],
    "generalized_dice": [{"smooth": 1.0}, {"smooth": 0.0}],
    "dice": [{"smooth": 0.0}],
    "jaccard": [{"smooth": 0.0}],
    "tversky": [{"alpha": 0.9, "beta": 0.1, "smooth": 0.5}],
    "lovasz": [],  # its one parameter, tolerance, has a law of its own
    "focal_tversky": [{"gamma": 2.0, "alpha": 0.6, "beta": 0.4, "smooth": 0.0}],
    "log_cosh_dice": [{"smooth": 0.0}],
    "unified_focal": [{"focal_weight": 0.3, "delta": 0.8, "gamma": 0.75, "smooth": 0.0}, {"gamma": 1.0}],
    "poly": [{"epsilon": -1.0}],
    "gce": [{"q": 1.0}, {"q": 1e-3}],
    "encouraging": [{"log_end": 0.25}, {"log_end": 0.0}],
    "dft": [{"beta": 0.5}],
    "z_regularized": [{"coefficient": 0.1}],
    "topk_cross_entropy": [{"k": 0.5}],
    "direct_coverage": [{"n": 1}, {"n": 10}],
    "asymmetric": [{"gamma_positive": 0.5, "gamma_negative": 0.5}, {"gamma_negative": 0.0}, {"label_smoothing": 0.0}],
    "squentropy": [{"coefficient": 0.01}],
    "spherical_z": [{"slope": 0.3, "offset": 2.0}],
    "ldr": [{"temperature": 0.5, "margin": 2.0}, {"temperature": 3.0}],
    "aldr": [{"alpha": 1.2, "temperature": 3.0, "margin": 1.0}, {"temperature": 0.3}],
    "entropy_adaptive": [{"k": 3, "alpha": 2.0}, {"alpha": 0.0}],
    "confidence_penalty": [{"coefficient": 1.0}],
    "gem": [{"beta": 0.3}, {"beta": 1.0}],
    "ldam": [{"max_margin": 2.0}],
    "weighted_cross_entropy": [{"power": 1.0, "cap": 1.5}],
    "thresholded": [{"threshold": 0.05, "keep": "below"}],
    "tofu": [{"gamma": 0.5, "temperature": 2.0}, {"gamma": 0.0}],
    "sed": [{"coefficient": 0.5, "k": 3, "threshold": 0.7}, {"threshold": 2.0}],
    "anchored": [{"coefficient": 2.0}],
    "importance_weighted": [{"cap": 0.5}],
    "idft": [{"beta": 5.0, "low": 0.0, "high": 0.5}],
    "number_token_wasserstein": [],  # their one parameter says which rows they look at, and has a test of its own
    "number_token_mse": [],
    "number_token_gaussian": [{"sigma": 4.0}, {"sigma": 1e-3}],
}
# Their gradient is not that of their value, on purpose.
DETACHED = [
    "self_adjusting_dice detach_weight=True",
    "dft",
    "dft beta=0.5",
    "entropy_adaptive",
    "entropy_adaptive k=3 alpha=2.0",
    "gem",
    "gem beta=0.3",
    "gem beta=1.0",
    "deft",
    "aldr",
    "aldr alpha=1.2 temperature=3.0 margin=1.0",
    "aldr temperature=0.3",
    "tofu",
    "tofu gamma=0.5 temperature=2.0",
    "idft",
    "idft beta=5.0 low=0.0 high=0.5",
    "anchored",
    "anchored coefficient=2.0",
    "importance_weighted",
    "importance_weighted cap=0.5",
]
# A certain and right prediction is not their minimum, and by their formula it need not be.
PERFECT_IS_NOT_BEST = [
    "cross_entropy label_smoothing=0.1",
    "self_adjusting_dice",  # (1 - p)^alpha p falls again above p = 1 / (1 + alpha)
    "self_adjusting_dice alpha=0.5 smooth=0.1",
    "self_adjusting_dice detach_weight=True",
    "z_regularized",  # these two would have the logits near 0 too
    "z_regularized coefficient=0.1",
    "asymmetric gamma_negative=0.0",  # label smoothing in full
    "asymmetric gamma_positive=0.5 gamma_negative=0.5",
    "confidence_penalty",  # which asks for entropy
    "confidence_penalty coefficient=1.0",
    "sparsemax",  # 0, its minimum, from a margin of 1 on, and so at predictions that are less than perfect
    "direct_coverage",  # 0 to rounding as soon as 256 answers are sure to have a right one
    "gem",  # its gradient leads there, but q is taken for a constant and the value may be below 0 elsewhere
    "gem beta=0.3",
    "gem beta=1.0",
    "thresholded",  # a token that is left out has the value 0
    "thresholded threshold=0.05 keep=below",
    "unlikelihood",
    "anchored",  # which asks for the probability that the reference gives
    "anchored coefficient=2.0",
    "aldr",  # whose values are at other temperatures elsewhere
    "aldr alpha=1.2 temperature=3.0 margin=1.0",
    "aldr temperature=0.3",
    "number_token_gaussian",  # a part of the probability is meant for other numbers
    "number_token_gaussian sigma=4.0",
    "a_row_loss",
]
# An impossible token (logit -inf) makes their value infinite, as their formula says.
NOT_WITH_IMPOSSIBLE_TOKENS = [
    "cross_entropy label_smoothing=0.1",
    "asymmetric gamma_negative=0.0",  # the same loss
    "squentropy",  # all logits are squared
    "squentropy coefficient=0.01",
    "spherical_z",  # their mean is infinite
    "spherical_z slope=0.3 offset=2.0",
    "number_token_gaussian",  # a number that is wanted
    "number_token_gaussian sigma=4.0",
    "a_row_loss",
]

# Losses of a stranger, registered in conftest.py.
STRANGERS = ("a_row_loss", "a_document_loss", "a_region_loss", "a_set_loss")


def listed():
    for name, loss in available_losses().items():
        yield name, loss.family, {}
        for parameters in VARIANTS.get(name, []):
            yield name, loss.family, parameters
    for name, family in zip(STRANGERS, ("row", "document", "region", "region"), strict=True):
        yield name, family, {}


LISTED = {" ".join([n, *(f"{k}={v}" for k, v in p.items())]): (n, f, p) for n, f, p in listed()}

# A few of every family, with all the statistics that a loss can ask for. Losses of a family share their code in the
# engine, so that what holds for these holds for the others.
REPRESENTATIVES = [
    "cross_entropy label_smoothing=0.1",
    "focal",
    "z_regularized",
    "ldam",
    "weighted_cross_entropy",
    "brier",
    "tofu",
    "sed",
    "idft",
    "anchored",
    "entropy_adaptive",
    "squentropy",
    "spherical_z",
    "asymmetric",
    "aldr",
    "gem",
    "sparsemax",
    "dice",
    "generalized_dice",
    "unified_focal",
    "lovasz",
    "topk_cross_entropy",
    "direct_coverage",
    "importance_weighted",
    "number_token_wasserstein",
    "number_token_mse",
    "number_token_gaussian sigma=4.0",
    *STRANGERS,
]


def each_loss(listed=LISTED, **axes):
    """For a law about the loss itself: each of them, with one value of the axes in turn; representatives with all."""
    values = combinations(axes)
    quick = {(name, *values[i % len(values)]) for i, name in enumerate(listed)}
    return product(quick | represented(axes), {"listed_as": list(listed), **axes})


def each_family(*more, **axes):
    """For a law that the engine keeps whatever the loss: the representatives alone, and what is named here."""
    return product(represented(axes, more), {"listed_as": [*LISTED, *more], **axes})


def represented(axes, more=()):
    return {(name, *values) for name in (*REPRESENTATIVES, *more) for values in combinations(axes)}


def term(listed_as, **fields):
    name, _, parameters = LISTED[listed_as]
    return {"loss": name, **parameters, **fields}


def of_numbers(listed_as):
    return listed_as in LISTED and LISTED[listed_as][1] == "number"


def groupings(listed_as):
    """What one set may be: nothing to choose for a loss without sets."""
    has_sets = LISTED[listed_as][1] in ("region", "ranking", "document")
    return [{"per": "document"}, {"per": "batch"}] if has_sets else [{}]


MIXTURE = [
    {"loss": "cross_entropy", "weight": 0.6, "scope": "sequence"},
    {"loss": "focal", "weight": 0.3},
    {"loss": "lovasz", "weight": 0.4},
    {"loss": "generalized_dice", "weight": 0.5, "per": "batch"},
]
# One of every family, for the engine to serve at once; not for the paper's code.
FAMILIES = [
    *MIXTURE,
    {"loss": "unified_focal", "weight": 0.3, "scope": "sequence"},
    {"loss": "a_row_loss", "weight": 0.2},
    {"loss": "a_document_loss", "weight": 0.7},
    {"loss": "number_token_mse", "weight": 0.1},
    {"loss": "number_token_gaussian", "sigma": 4.0, "weight": 0.3},
]


def objective(*terms, **options):
    return Objective.from_config({"terms": list(terms), **options}, **KNOWN)


def counted(listed_as, completion, numbers=None):
    """The rows of a step, for num_items_in_batch, where the loss looks at the numbers alone too."""
    (one,) = objective(term(listed_as)).terms
    return {"completion": completion, one.rows: completion if numbers is None else numbers}


def evaluate(batch, *terms, logits=None, **more):
    """The result of a batch, and the gradient of its logits."""
    leaf = (batch.logits if logits is None else logits).clone().requires_grad_()
    result = batch.result(objective(*terms), leaf, **more)
    return result, torch.autograd.grad(result.loss, leaf)[0]


def naive(batch, *terms):
    leaf = batch.logits.clone().requires_grad_()
    loss = naive_loss(batch, leaf, terms)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def certain(labels, confidence, vocab=VOCAB):
    """Logits that are right about every label, with this difference to all others."""
    return confidence * torch.nn.functional.one_hot(labels.clamp_min(0), vocab).double()
