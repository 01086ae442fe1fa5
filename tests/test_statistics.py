"""The statistics of comparisons, against simulations in which the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from common.statistics import (
    Interval,
    bootstrap_interval,
    holm,
    multiplicities,
    paired_t,
    seeds_to_tell,
    wider,
)

COMPARISONS = 2000


def test_paired_t_is_that_of_scipy() -> None:
    ours, base = np.random.default_rng(0).normal(size=(2, 5))
    found, expected = paired_t(ours - base), stats.ttest_rel(ours, base)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-12)
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-12)


def test_one_seed_has_no_interval_and_equal_differences_have_no_width() -> None:
    assert paired_t([0.5]).interval is None
    assert paired_t([0.0, 0.0]).p == 1
    same = paired_t([0.1 + 0.2, 0.3])
    assert same.p == 0
    assert same.interval is not None
    assert same.interval.width == 0


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_equal_losses_are_told_apart_in_5_of_100_comparisons(seeds: int) -> None:
    """Pairs share what a seed does to both, which is much more than what is their own."""
    generator = np.random.default_rng(seeds)
    shared = generator.normal(0, 3, size=(COMPARISONS, seeds))
    first, second = shared + generator.normal(0, 0.5, size=(2, COMPARISONS, seeds))
    found = [paired_t(each) for each in second - first]
    wrong = np.mean([each.interval is not None and 0 not in each.interval for each in found])
    assert 0.035 <= wrong <= 0.065
    assert wrong == np.mean([each.p is not None and each.p < 0.05 for each in found])


def test_holm_keeps_5_percent_for_all_candidates_together() -> None:
    generator = np.random.default_rng(1)
    values = generator.normal(size=(COMPARISONS, 5, 4))  # the first of five is the reference
    wrong = []
    for scores in values:
        p_values = [paired_t(scores[k] - scores[0]).p or 0.0 for k in range(1, 5)]
        wrong.append(min(holm(p_values)) < 0.05)
    assert 0.015 <= np.mean(wrong) <= 0.065  # below 0.05: the comparisons share a reference


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


@pytest.mark.parametrize("images", [30, 80])
def test_the_image_bootstrap_covers_a_difference_of_mious(images: int) -> None:
    """Ratios of sums over images that correlate, as of two models on one test set."""
    generator = np.random.default_rng(images)
    weights = multiplicities(images, 1000)
    covered = []
    for _ in range(COMPARISONS):
        size = generator.gamma(4, 1, images)
        hardness = generator.normal(0, 0.1, images)
        ious = [
            np.clip(mean + hardness + generator.normal(0, 0.05, images), 0, 1)
            for mean in (0.55, 0.5)
        ]
        union = weights @ size
        resampled = (weights @ (ious[0] * size) - weights @ (ious[1] * size)) / union
        found = bootstrap_interval(resampled, images)
        covered.append(found is not None and 0.05 in found)
    assert 0.93 <= np.mean(covered) <= 0.97


def test_bootstrap_has_no_interval_of_one_image_or_without_values() -> None:
    assert bootstrap_interval(np.zeros(10), 1) is None
    assert bootstrap_interval(np.full(10, np.nan), 5) is None


def test_each_resample_has_as_many_images() -> None:
    weights = multiplicities(7, 50, seed=3)
    assert weights.shape == (50, 7)
    assert (weights.sum(1) == 7).all()
    assert (weights == multiplicities(7, 50, seed=3)).all()


def test_the_wider_interval() -> None:
    assert wider(Interval(0, 1), None, Interval(2, 5)) == Interval(2, 5)
    assert wider(None) is None


@pytest.mark.parametrize(("effect", "comparisons"), [(2.0, 1), (1.0, 1), (1.0, 3)])
def test_so_many_seeds_tell_the_difference(effect: float, comparisons: int) -> None:
    seeds = seeds_to_tell(effect, 1.0, comparisons)
    assert seeds is not None

    def power(seeds: int) -> float:
        values = np.random.default_rng(0).normal(effect, 1, (4000, seeds))
        return float(np.mean(stats.ttest_1samp(values, 0, axis=1).pvalue < 0.05 / comparisons))

    assert power(seeds) >= 0.78
    assert power(seeds - 1) < 0.82


def test_no_number_of_seeds_tells_nothing() -> None:
    assert seeds_to_tell(0, 1) is None
    assert seeds_to_tell(1, 0) == 2
