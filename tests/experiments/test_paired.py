"""Statistics over seeds against values worked out by hand and against scipy."""

import numpy as np
import pytest
from scipy import stats

from paired import paired_difference, share_of_gap


def test_a_difference_worked_out_by_hand():
    # Differences -1, -2, -3: mean -2, deviation 1, t_2 = 4.303: 4.303 / sqrt(3) = 2.484.
    difference = paired_difference({0: 4.0, 1: 5.0, 2: 6.0, 9: 100.0}, {0: 5.0, 1: 7.0, 2: 9.0, 8: -100.0})
    assert difference.mean == pytest.approx(-2)
    assert difference.half_width == pytest.approx(2.4842, abs=1e-4)
    assert difference.num_better == 3
    assert difference.differences == {0: -1.0, 1: -2.0, 2: -3.0}
    assert not difference.is_off_zero


@pytest.mark.parametrize("count", [2, 3, 7, 30])
def test_intervals_are_scipys(count):
    values, control = np.random.default_rng(count).normal(size=(2, count))
    difference = paired_difference(dict(enumerate(values)), dict(enumerate(control)))
    interval = stats.ttest_rel(values, control).confidence_interval(0.95)
    assert difference.mean - difference.half_width == pytest.approx(interval.low)
    assert difference.mean + difference.half_width == pytest.approx(interval.high)
    assert difference.num_better == sum(values < control)
    assert difference.is_off_zero == (interval.low > 0 or interval.high < 0)


def test_one_seed_has_no_interval_and_none_no_difference():
    assert paired_difference({0: 1.0}, {0: 3.0}).half_width is None
    assert not paired_difference({0: 1.0}, {0: 3.0}).is_off_zero
    assert paired_difference({0: 1.0}, {1: 3.0}) is None


def test_equal_differences_are_off_zero():
    assert paired_difference({0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.0}).is_off_zero
    assert not paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).is_off_zero


def test_share_of_the_gap():
    baseline = {0: 10.0, 1: 14.0, 2: 1000.0}
    assert share_of_gap({0: 4.0, 1: 8.0, 7: -1.0}, baseline, target=2.0) == pytest.approx(0.6)
    assert share_of_gap({0: 20.0}, baseline, target=2.0) == pytest.approx(-1.25)
    assert share_of_gap({0: 1.0}, {0: 2.0}, target=2.0) is None  # there is no gap
    assert share_of_gap({0: 1.0}, {0: 1.5}, target=2.0) is None  # the baseline is past the target
    assert share_of_gap({0: 1.0}, {1: 2.0}, target=0.0) is None
