"""Stochastic depth: evaluation is untouched, training drops samples and keeps the mean."""

import pytest
import torch

from medmamba.networks.drop_path import DropPath, drop_rates


def test_evaluation_leaves_branches_alone() -> None:
    x = torch.randn(3, 2)
    assert DropPath(0.9).eval()(x) is x


def test_training_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    kept = DropPath(0.25)(torch.ones(4000, 3))
    assert kept.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (kept == kept[:, :1]).all()
    assert kept.mean() == pytest.approx(1.0, abs=0.05)


def test_rates_grow_linearly() -> None:
    assert drop_rates(5, 0.0, 0.5) == pytest.approx([0.0, 0.125, 0.25, 0.375, 0.5])
    assert drop_rates(1, 0.2, 0.5) == [0.2]
