"""What differences over seeds and examples decide. Needs numpy and scipy, no torch."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.05
RESAMPLES = 10_000


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, which one value does not have."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


@dataclass(frozen=True)
class Paired:
    """Differences over seeds: their mean, its 95% interval and the p-value of the paired t-test, where they exist."""

    mean: float
    error: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None


def paired(differences: Sequence[float]) -> Paired:
    """A two-sided paired t-test. One seed has no spread; differences without spread have no t-test either."""
    if not all(map(math.isfinite, differences)):
        return Paired(math.nan)
    mean, error = mean_and_error(differences)
    if error is None:
        return Paired(mean)
    # Rounding alone may stand for a spread of nothing.
    scale = max(1.0, max(map(abs, differences)))
    if error <= len(differences) * np.finfo(float).eps * scale:
        return Paired(mean, 0.0, mean, mean, 1.0 if abs(mean) <= np.finfo(float).eps * scale else None)
    test = stats.ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(1 - LEVEL)
    return Paired(mean, error, float(interval.low), float(interval.high), float(test.pvalue))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's correction for the comparisons that have a p-value: the k-th smallest of m is multiplied by m - k + 1,
    and none is below the ones before it."""
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, place) in enumerate(order):
        least = max(least, min(1.0, p * (len(order) - rank)))
        corrected[place] = least
    return corrected


@functools.lru_cache(maxsize=1)  # takes nearly all the time of a bootstrap, and all objectives have the same
def drawn(seeds: int, examples: int, resamples: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The weights of examples and of seeds in each resample, (resamples, examples) and (resamples, seeds)."""
    generator = np.random.default_rng(0)
    of_examples, of_seeds = (generator.multinomial(n, np.full(n, 1 / n), size=resamples) / n for n in (examples, seeds))
    return of_examples, of_seeds


def bootstrap(
    differences: Sequence[Sequence[float]], over_seeds: bool, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The 95% percentile interval of the mean of paired differences, one row a seed and one column an example.

    Examples are drawn again in every resample, the same for all seeds; with ``over_seeds`` the seeds are drawn again,
    too. The first says what other examples would have shown of these very models, the second what other examples and
    other trainings would have. The generator is seeded: the same lines give the same interval.
    """
    table = np.asarray(differences, dtype=float)
    of_examples, of_seeds = drawn(*table.shape, resamples)
    by_seed = of_examples @ table.T  # resamples x seeds
    means = (by_seed * of_seeds).sum(1) if over_seeds else by_seed.mean(1)
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def verdict(p: float | None, interval: tuple[float, float] | None, mean: float) -> str:
    """Better or worse only where the corrected t-test over seeds and the bootstrap over seeds and examples agree.

    Without a p-value, as after one seed, nothing is decided.
    """
    if p is None or p >= LEVEL or (interval is not None and interval[0] <= 0 <= interval[1]):
        return "not decided"
    return "better" if mean > 0 else "worse"
