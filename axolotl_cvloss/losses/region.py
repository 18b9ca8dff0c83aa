"""Losses of a set of rows: functions of class sums.

A set is a document (or the micro-batch); its classes c are the tokens that occur among its labels. Each loss takes
``intersection`` I, ``predicted`` S and ``labelled`` N, each (C,), float32 or float64, and returns a value a class,
(C,), whose mean is the value of the set. Those that are registered as ``at_once``, or ask for ``classes``, get the
classes of all sets at once; the latter return one value a set, (S,). ``logp`` (n,) has the log-probabilities of the
targets of the ``rows`` of the sets.

All of them are bounded, and flat where the model is far off, so mix them with cross-entropy.
"""

from torch import Tensor

from ..engine.segments import Segments
from . import reference
from .bounds import Fraction, NonNegative, Positive, PositiveFraction
from .hookspecs import hookimpl
from .token import _tiny, focal


def tversky(
    intersection: Tensor,
    predicted: Tensor,
    labelled: Tensor,
    alpha: NonNegative = 0.3,
    beta: Positive = 0.7,
    smooth: NonNegative = 1.0,
) -> Tensor:
    """Overlap with a price of its own for false positives (``alpha``) and for misses (``beta``).

    Formula: 1 - (I_c + smooth) / (I_c + alpha (S_c - I_c) + beta (N_c - I_c) + smooth), mean over c
    Source: Salehi et al. 2017, Tversky loss function for image segmentation, arXiv:1706.05721; smooth is ours
    Helps: where missing a token is worse than putting it in a wrong place (beta above alpha), or the other way round.
    Hurts: alone, as it is flat where the model is far off. No evidence in fine-tuning yet.

    Args:
        intersection: (C,), probability of the class summed over the rows labelled with it.
        predicted: (C,), probability of the class summed over all rows of its set.
        labelled: (C,), number of rows labelled with the class.
        alpha: Price of a false positive.
        beta: Price of a miss.
        smooth: Added to both sides of the fraction; keeps classes of few rows from counting in full.
    """
    false = alpha * (predicted - intersection) + beta * (labelled - intersection)
    return false / (intersection + false + smooth)  # 1 - x / (x + false) without cancellation near 0


def dice(intersection: Tensor, predicted: Tensor, labelled: Tensor, smooth: NonNegative = 1.0) -> Tensor:
    """Dice coefficient of each class.

    Formula: 1 - (2 I_c + smooth) / (S_c + N_c + smooth), mean over c
    Source: Milletari et al. 2016, V-Net, arXiv:1606.04797
    Helps: beside cross-entropy, where rare tokens of a short answer decide: each class counts the same.
    Hurts: alone, as it is flat where the model is far off. No evidence in fine-tuning yet.

    Args:
        intersection: (C,), probability of the class summed over the rows labelled with it.
        predicted: (C,), probability of the class summed over all rows of its set.
        labelled: (C,), number of rows labelled with the class.
        smooth: Added to both sides of the fraction; keeps classes of few rows from counting in full.
    """
    return tversky(intersection, predicted, labelled, alpha=0.5, beta=0.5, smooth=smooth / 2)


def jaccard(intersection: Tensor, predicted: Tensor, labelled: Tensor, smooth: NonNegative = 1.0) -> Tensor:
    """Intersection over union of each class.

    Formula: 1 - (I_c + smooth) / (S_c + N_c - I_c + smooth), mean over c
    Source: Rahman and Wang 2016, Optimizing Intersection-Over-Union in Deep Neural Networks
    Helps: as dice, with a stronger pull on the worst classes.
    Hurts: alone, as it is flat where the model is far off. No evidence in fine-tuning yet.

    Args:
        intersection: (C,), probability of the class summed over the rows labelled with it.
        predicted: (C,), probability of the class summed over all rows of its set.
        labelled: (C,), number of rows labelled with the class.
        smooth: Added to both sides of the fraction; keeps classes of few rows from counting in full.
    """
    return tversky(intersection, predicted, labelled, alpha=1.0, beta=1.0, smooth=smooth)


def jaccard_metric(intersection: Tensor, predicted: Tensor, labelled: Tensor) -> Tensor:
    """The Jaccard metric loss. On hard labels, which tokens are, it is jaccard without smoothing.

    D is the sum over the rows of the distance between p[c] and the label, and S + N - 2 I where labels are 0 or 1,
    whatever the predictions.

    Formula: 1 - (S_c + N_c - D_c) / (S_c + N_c + D_c), D_c = sum_i |p_i[c] - [y_i = c]|, mean over c
    Source: Wang et al. 2023, Jaccard Metric Losses, arXiv:2302.05666
    Helps: as jaccard; what it adds is for soft labels, which there are none of here.
    Hurts: as jaccard, and without smoothing classes of one token count in full. No evidence in fine-tuning yet.

    Args:
        intersection: (C,), probability of the class summed over the rows labelled with it.
        predicted: (C,), probability of the class summed over all rows of its set.
        labelled: (C,), number of rows labelled with the class.
    """
    return jaccard(intersection, predicted, labelled, smooth=0.0)


def focal_tversky(
    intersection: Tensor,
    predicted: Tensor,
    labelled: Tensor,
    alpha: NonNegative = 0.3,
    beta: Positive = 0.7,
    gamma: Positive = 0.75,
    smooth: NonNegative = 1.0,
) -> Tensor:
    """The Tversky loss of each class to a power: below 1 the pull on nearly right classes grows, above 1 it fades.

    The paper writes the exponent 1 / gamma with gamma 4/3, and its alpha and beta are the other way round.

    Formula: tversky_c^gamma, mean over c
    Source: Abraham and Khan 2018, A Novel Focal Tversky Loss Function, arXiv:1810.07842; smooth is ours
    Helps: as tversky; gamma says which classes to attend to.
    Hurts: with gamma below 1 the gradient grows without bound as a class gets right. No evidence in fine-tuning yet.

    Args:
        intersection: (C,), probability of the class summed over the rows labelled with it.
        predicted: (C,), probability of the class summed over all rows of its set.
        labelled: (C,), number of rows labelled with the class.
        alpha: Price of a false positive.
        beta: Price of a miss.
        gamma: The power.
        smooth: Added to both sides of the fraction; keeps classes of few rows from counting in full.
    """
    # The derivative of 0^gamma is infinite for gamma < 1: keep away from 0.
    return tversky(intersection, predicted, labelled, alpha, beta, smooth).clamp_min(_tiny(intersection)) ** gamma


def log_cosh_dice(
    intersection: Tensor, predicted: Tensor, labelled: Tensor, classes: Segments, smooth: NonNegative = 1.0
) -> Tensor:
    """Dice made smooth near 0, where it becomes half its square.

    Formula: log cosh(mean over c of dice_c)
    Source: Jadon 2020, A survey of loss functions for semantic segmentation, arXiv:2006.14822
    Helps: as dice, with gradients that fade towards the end of training.
    Hurts: as dice, and it stops sooner. No evidence in fine-tuning yet.

    Args:
        intersection: (C,), probability of the class summed over the rows labelled with it.
        predicted: (C,), probability of the class summed over all rows of its set.
        labelled: (C,), number of rows labelled with the class.
        classes: The classes of the sets (C,), and whose they are.
        smooth: Added to both sides of the fraction; keeps classes of few rows from counting in full.
    """
    return classes.mean(dice(intersection, predicted, labelled, smooth)).cosh().log()


def unified_focal(
    intersection: Tensor,
    predicted: Tensor,
    labelled: Tensor,
    logp: Tensor,
    classes: Segments,
    rows: Segments,
    focal_weight: Fraction = 0.5,
    delta: PositiveFraction = 0.6,
    gamma: PositiveFraction = 0.5,
    smooth: NonNegative = 1.0,
) -> Tensor:
    """Focal and focal Tversky mixed, with parameters in common; the paper's symmetric form.

    Formula: focal_weight delta mean_i focal(1 - gamma) + (1 - focal_weight) focal_tversky(1 - delta, delta, gamma)
    Source: Yeung et al. 2021, Unified Focal loss, arXiv:2102.04525; smooth is ours, the paper's is 1e-6
    Helps: one set of parameters in the place of a mixture of two terms.
    Hurts: it takes away the choice of scope and weight for each part. No evidence in fine-tuning yet.

    Args:
        intersection: (C,), probability of the class summed over the rows labelled with it.
        predicted: (C,), probability of the class summed over all rows of its set.
        labelled: (C,), number of rows labelled with the class.
        logp: (n,), log p of the target of each row.
        classes: The classes of the sets (C,), and whose they are.
        rows: The rows of the sets (n,), and whose they are.
        focal_weight: Share of the focal part; the rest is that of regions.
        delta: Price of a miss, and weight of the focal part.
        gamma: The power of regions; that of focal is 1 - gamma.
        smooth: Added to both sides of the fraction; keeps classes of few rows from counting in full.
    """
    tokens = delta * rows.mean(focal(logp, gamma=1 - gamma))
    regions = classes.mean(focal_tversky(intersection, predicted, labelled, 1 - delta, delta, gamma, smooth))
    return focal_weight * tokens + (1 - focal_weight) * regions


def generalized_dice(
    intersection: Tensor, predicted: Tensor, labelled: Tensor, classes: Segments, smooth: NonNegative = 1e-5
) -> Tensor:
    """Dice over all classes at once, each weighted by the inverse of its squared size.

    Formula: 1 - (2 sum_c w_c I_c + smooth) / (sum_c w_c (S_c + N_c) + smooth), w_c = 1 / N_c^2
    Source: Sudre et al. 2017, Generalised Dice overlap, arXiv:1707.03237
    Helps: beside cross-entropy, where tokens that occur once in an answer decide.
    Hurts: frequent tokens hardly count. The paper's own figures for it say nothing: its code trains nothing with it.

    Args:
        intersection: (C,), probability of the class summed over the rows labelled with it.
        predicted: (C,), probability of the class summed over all rows of its set.
        labelled: (C,), number of rows labelled with the class.
        classes: The classes of the sets (C,), and whose they are.
        smooth: Added to both sides of the fraction.
    """
    weight = labelled**-2
    overlap = classes.sum(weight * intersection)
    return 1 - (2 * overlap + smooth) / (classes.sum(weight * (predicted + labelled)) + smooth)


@hookimpl
def cvloss_register_losses(register):  # type: ignore[no-untyped-def]
    register("generalized_dice", family="region", reference=reference.generalized_dice)(generalized_dice)
    for function in (dice, jaccard, tversky, jaccard_metric, focal_tversky):
        register(function.__name__, family="region", at_once=True)(function)
    register("log_cosh_dice", family="region")(log_cosh_dice)
    register("unified_focal", family="region")(unified_focal)
