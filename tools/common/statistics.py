"""How sure a difference between two losses is: over seeds, and over the images of a test set.

Seeds: paired t intervals. With the few seeds that anybody trains they keep their level, which
neither the mean with 1.96 standard errors nor a bootstrap over seeds does. Images: a bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95
POWER = 0.8
MOST_SEEDS = 1000


class Interval(NamedTuple):
    """From ``low`` to ``high``."""

    low: float
    high: float

    @property
    def width(self) -> float:
        """The distance of the ends."""
        return self.high - self.low

    def __contains__(self, value: object) -> bool:
        return isinstance(value, (int, float)) and self.low <= value <= self.high


@dataclass(frozen=True)
class Paired:
    """What the differences of pairs say.

    Attributes:
        mean: mean difference.
        interval: t interval of it; None of a single pair.
        p: of the two-sided t test against no difference; None of a single pair.
    """

    mean: float
    interval: Interval | None = None
    p: float | None = None


def paired_t(differences: Sequence[float], level: float = LEVEL) -> Paired:
    """The paired t interval and test over seeds.

    Args:
        differences: of two candidates, one for each seed that both were trained with.
        level: of the interval.
    """
    values = np.asarray(differences, np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return Paired(mean)
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    if error <= 1e-12 * np.abs(values).max():  # all the same, up to rounding
        return Paired(mean, Interval(mean, mean), float(mean == 0))
    freedom = len(values) - 1
    half = float(stats.t.ppf((1 + level) / 2, freedom)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, freedom))
    return Paired(mean, Interval(mean - half, mean + half), p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values: with all of them below 0.05, any error has 5 %."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def multiplicities(images: int, resamples: int, seed: int = 0) -> NDArray[np.int64]:
    """How often each image is in each resample, ``(resamples, images)``."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(images, np.full(images, 1 / images), size=resamples)


def bootstrap_interval(
    resampled: NDArray[np.float64], images: int, level: float = LEVEL
) -> Interval | None:
    """The interval between two percentiles of a statistic over resamples of the images.

    The percentiles are a little further out than the level says, by as much as a t interval is
    wider than a normal one with the standard deviation over n: else it is too narrow for few
    images (Hesterberg 2015, What Teachers Should Know about the Bootstrap).

    Args:
        resampled: the statistic of each resample; NaN where it had no value.
        images: how many there are.
        level: of the interval.

    Returns:
        None if there are too few images or values.
    """
    values = resampled[np.isfinite(resampled)]
    if images < 2 or len(values) < 2:
        return None
    quantile = stats.t.ppf((1 - level) / 2, images - 1) * math.sqrt(images / (images - 1))
    tail = float(stats.norm.cdf(quantile))
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(float(low), float(high))


def wider(*intervals: Interval | None) -> Interval | None:
    """The widest of those that there are."""
    there = [interval for interval in intervals if interval is not None]
    return max(there, key=lambda interval: interval.width, default=None)


def seeds_to_tell(
    difference: float, spread: float, comparisons: int = 1, level: float = LEVEL
) -> int | None:
    """With how many seeds a paired t test finds a difference with a probability of 80 %.

    Args:
        difference: the true difference, for which the observed one stands in.
        spread: standard deviation of the difference from seed to seed.
        comparisons: how many candidates are compared, which each has its part of the 5 %.
        level: 1 - level is the probability of a false alarm.

    Returns:
        None for more than 1000.
    """
    if spread == 0:
        return 2
    tail = (1 - level) / 2 / comparisons
    for seeds in range(2, MOST_SEEDS + 1):
        critical = stats.t.ppf(1 - tail, seeds - 1)
        effect = abs(difference) / spread * math.sqrt(seeds)
        if stats.nct.sf(critical, seeds - 1, effect) >= POWER:
            return seeds
    return None
