"""Density, coverage and nearest neighbours of sets on a line, counted by hand."""

import pytest
import torch

from metrics import manifold
from metrics.manifold import count_neighbours, nearest_neighbours, neighbour_distances, probability_closer


def line(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


def density_and_coverage(samples, reference, neighbourhood=5):
    found = count_neighbours(samples, reference, density_neighbourhood=neighbourhood)
    return found["density"].value, found["coverage"].value


def test_neighbour_distances_exclude_the_point_itself():
    first, second = neighbour_distances(line(0, 1, 3, 7), [1, 2])
    assert first.tolist() == [1, 1, 2, 4]
    assert second.tolist() == [3, 2, 3, 6]


def test_density_and_coverage_counted_by_hand():
    """Balls (0 ± 1), (1 ± 1), (3 ± 2), (7 ± 4): a sample at 1.5 lies in the 2nd and 3rd, one at 20 in none."""
    density, coverage = density_and_coverage(line(1.5, 20), line(0, 1, 3, 7), neighbourhood=1)
    assert density == pytest.approx(2 / (1 * 2))
    assert coverage == pytest.approx(2 / 4)
    swapped = density_and_coverage(line(0, 1, 3, 7), line(1.5, 20), neighbourhood=1)
    assert swapped == (pytest.approx((4 + 2) / 4), 1)  # the balls are 1.5 ± 18.5 and 20 ± 18.5


def test_density_passes_one_where_samples_crowd_and_coverage_sees_it():
    reference = torch.arange(100.0)[:, None]
    density, coverage = density_and_coverage(torch.full((50, 1), 50.2), reference)
    assert density > 0.9
    assert coverage < 0.1


def test_a_copy_on_the_edge_of_a_ball_lies_outside_wherever_it_stands():
    """A copy of the fifth neighbour is on the edge of a ball, and not inside, which rounding once decided."""
    generator = torch.Generator().manual_seed(0)
    for number in range(41, 61):
        reference = torch.randn(number, 8, generator=generator).double() + 3
        found = count_neighbours(reference[torch.randperm(number, generator=generator)], reference)
        assert {name: score.value for name, score in found.items()} == dict.fromkeys(found, 1.0)


def test_rows_at_a_time_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, generator=generator), torch.randn(40, 4, generator=generator)
    whole = count_neighbours(x, y), nearest_neighbours(x, y)[1].tolist()
    monkeypatch.setattr(manifold, "ROWS", 7)
    monkeypatch.setattr(manifold, "AT_ONCE", 9)
    assert (count_neighbours(x, y), nearest_neighbours(x, y)[1].tolist()) == whole


def test_nearest():
    distances, index = nearest_neighbours(line(0.9, 6), line(0, 1, 3, 7))
    assert index.tolist() == [1, 3]
    assert distances.tolist() == pytest.approx([0.1, 1.0])


def test_share_of_pairs_counts_ties_half():
    assert probability_closer(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])) == pytest.approx(3.5 / 4)
    assert probability_closer(torch.tensor([5.0]), torch.tensor([1.0, 2.0])) == 0
