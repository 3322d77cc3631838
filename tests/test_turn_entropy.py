"""AT2PO's diagnostic H_turn: how evenly the drift of a chain is spread over its turns."""

from __future__ import annotations

import pytest
import torch

from learner.loss.turn_entropy import turn_entropy


def entropy(drifts: list[list[float]], tokens: int = 2) -> tuple[float, float]:
    """Mean and number, of rows with these log-ratios of their turns, each spread over ``tokens`` tokens."""
    turn, row, difference, number = [], [], [], 0
    for at, chain in enumerate(drifts):
        for drift in chain:
            turn += [number] * tokens + [-1]
            row += [at] * (tokens + 1)
            difference += [drift / tokens] * tokens + [9.0]
            number += 1
    total, rows = turn_entropy(torch.tensor(difference), torch.tensor(turn), torch.tensor(row))
    return float(total / rows) if rows else 0.0, float(rows)


def test_it_has_the_value_of_the_published_definition() -> None:
    assert entropy([[0.2, 0.1, 0.3]])[0] == pytest.approx(0.9916300, abs=1e-7)


def test_turns_that_drift_alike_give_one_and_a_single_turn_none() -> None:
    assert entropy([[0.3, 0.3, 0.3, 0.3]])[0] == pytest.approx(1.0)
    assert entropy([[0.3]]) == (0.0, 1.0)
    # 4 and -3 times their sum: p = softmax(4, -3).
    assert entropy([[0.4, -0.3]])[0] == pytest.approx(0.0105156, abs=1e-6)


def test_it_is_the_mean_over_chains_without_those_that_did_not_move() -> None:
    mean, rows = entropy([[0.2, 0.1, 0.3], [0.1], [0.0, 0.0]])
    assert mean == pytest.approx(0.9916300 / 2, abs=1e-7)
    assert rows == 2.0
    assert entropy([[0.0]])[1] == 0.0
    assert turn_entropy(torch.zeros(3), torch.full((3,), -1), torch.zeros(3, dtype=torch.long))[1] == 0.0
