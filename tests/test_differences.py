"""Significance over training seeds: paired differences, Holm's correction, and their wording."""

from statistics import fmean, stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ablation.results import correct_p_values, holm, paired_t_test


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12))
def test_a_paired_difference_is_students(differences):
    if stdev(differences) < 1e-6:
        return
    mine, theirs = {seed: 7.0 + value for seed, value in enumerate(differences)}, dict.fromkeys(range(20), 7.0)
    found, test = paired_t_test(mine, theirs), stats.ttest_1samp(differences, 0)
    assert found is not None
    assert (found.mean, found.p) == pytest.approx((fmean(differences), test.pvalue), abs=1e-5)
    assert (found.low, found.high) == pytest.approx(test.confidence_interval(0.95), abs=1e-4, rel=1e-4)
    assert found.num_seeds == len(differences)


def test_differences_that_are_all_equal_or_of_one_seed_are_not_tested():
    assert paired_t_test({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}) is None
    assert paired_t_test({0: 2.0, 1: 3.0}, {0: 1.0, 2: 2.0}) is None
    assert paired_t_test({0: 11 / 20, 1: 12 / 20}, {0: 10 / 20, 1: 11 / 20}) is None  # once decided, by rounding alone


def test_p_values_are_corrected_step_by_step():
    """The example of Holm's method: 0.01 * 4, 0.02 * 3 (0.06), 0.03 * 2 raised to 0.06, 0.5."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_without_an_effect_five_variants_give_a_false_positive_in_one_study_of_twenty():
    """Without correction about one study in five would claim a difference."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(120):
        by_seed = [dict(enumerate(scores)) for scores in rng.normal(size=(6, 5))]
        found = correct_p_values({str(place): paired_t_test(one, by_seed[0]) for place, one in enumerate(by_seed[1:])})
        wrong += any(one.is_decided for one in found.values())
    assert wrong <= 10


def test_a_real_effect_is_found_and_said_with_its_interval():
    mine, theirs = {0: 50.0, 1: 51.0, 2: 49.5}, {0: 60.0, 1: 61.5, 2: 59.0}
    difference = correct_p_values({"XSwin": paired_t_test(mine, theirs)})["XSwin"]
    assert difference.sentence("XSwin", "DiT", lower_is_better=True, digits=2) == (
        "XSwin is better than DiT by 10.00 (95% interval 8.76 to 11.24, 3 seeds, corrected p = 0.00083)"
    )
    assert difference.sentence("XSwin", "DiT", lower_is_better=False).startswith("XSwin is worse than DiT by 10.0")


def test_what_the_seeds_do_not_decide_is_said_to_be_undecided():
    none = correct_p_values({"XSwin": paired_t_test({0: 50.0, 1: 61.0}, {0: 60.0, 1: 52.0})})["XSwin"]
    assert none.sentence("XSwin", "DiT", True, 1).startswith(
        "XSwin against DiT is undecided: the interval holds 0 (95%"
    )
    close = {str(place): paired_t_test({0: 1.0, 1: 2.0, 2: 1.5}, {0: 0.0, 1: 0.5, 2: 0.2}) for place in range(9)}
    words = correct_p_values(close)["0"].sentence("a", "b", True, 1)
    assert words.startswith("a against b is undecided: too many comparisons for so few seeds (95% interval 0.")
