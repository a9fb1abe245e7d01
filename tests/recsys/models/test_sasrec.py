"""The sequential model: nothing of the future, nothing of the padding, and the windows it reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from apps.recsys.models.sasrec import SasrecOptions, gather_windows, last_items
from tests.recsys.made import histories, history_of, sasrec

N_ITEMS = 11


@pytest.fixture
def model():
    return sasrec(4, N_ITEMS, length=6)


def test_a_later_item_changes_no_earlier_state(model):
    first = torch.randint(N_ITEMS, (3, 6), generator=torch.Generator().manual_seed(0))
    states = model.hidden(first)
    for place in range(6):
        other = first.clone()
        other[:, place:] = (other[:, place:] + 1) % N_ITEMS
        changed = model.hidden(other)
        torch.testing.assert_close(changed[:, :place], states[:, :place])
        assert (changed[:, place] - states[:, place]).abs().amax(dim=1).min() > 1e-3  # and its own state it does


def test_a_state_is_that_of_the_prefix_encoded_alone(model):
    sequence = torch.randint(N_ITEMS, (1, 6), generator=torch.Generator().manual_seed(1))
    states = model.hidden(sequence)
    for place in range(6):
        alone = model.hidden(sequence[:, : place + 1])
        torch.testing.assert_close(alone[:, -1], states[:, place])


def test_padding_changes_nothing_even_while_training(model):
    """No value of a state and no gradient: the padding's embedding gets none."""
    sequence = torch.tensor([[3, 1, 4]])
    padded = torch.tensor([[3, 1, 4, N_ITEMS, N_ITEMS, N_ITEMS]])
    torch.testing.assert_close(model.hidden(padded)[:, :3], model.hidden(sequence))
    model.train()
    model.hidden(padded)[:, :3].sum().backward()
    assert not model.item.grad[N_ITEMS].any()


def test_every_parameter_learns(model):
    model.train()
    states = model.hidden(torch.randint(N_ITEMS, (3, 6), generator=torch.Generator().manual_seed(0)))
    (states @ model.item_vectors().T).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


def test_a_user_is_scored_from_the_last_items_of_the_history_given(model):
    """Longer than the model reads, shorter, a single item, and none at all."""
    given = history_of([[9, 8, 7, 6, 5, 4, 3, 2, 1], [2, 5], [10], []], N_ITEMS)
    got = model.scores(torch.tensor([3, 0, 1, 2]), given)
    for row, items in enumerate([[], [6, 5, 4, 3, 2, 1], [2, 5], [10]]):
        wanted = torch.zeros(N_ITEMS)
        if items:
            wanted = model.hidden(torch.tensor([items]))[0, -1] @ model.item[:N_ITEMS].T
        torch.testing.assert_close(got[row], wanted)


def test_scores_do_not_depend_on_who_else_is_asked(model):
    given = histories(4, N_ITEMS, longest=9, seed=2)
    together = model.scores(torch.arange(4), given)
    for user in range(4):
        torch.testing.assert_close(model.scores(torch.tensor([user]), given)[0], together[user])


def test_last_items_and_windows_against_slices():
    given = histories(8, N_ITEMS, longest=9, seed=5)
    users = np.array([7, 0, 3, 3])
    sequences, lengths = last_items(given, users, 4)
    for row, user in enumerate(users):
        items = given.of(user)[-4:].tolist()
        assert lengths[row] == len(items)
        assert sequences[row].tolist() == items + [N_ITEMS] * (sequences.shape[1] - len(items))
    assert sequences.shape[1] == max(lengths.max(), 1)
    windows, _ = gather_windows(given, np.array([2, 5]), np.array([3, 1]))
    assert windows.tolist() == [given.items[2:5].tolist(), [int(given.items[5]), N_ITEMS, N_ITEMS]]


def test_only_empty_histories():
    sequences, lengths = last_items(history_of([[], []], N_ITEMS), np.array([1, 0]), 4)
    assert sequences.tolist() == [[N_ITEMS], [N_ITEMS]]
    assert lengths.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"heads": 0}, "heads"),
        ({"dimension": 10, "heads": 4}, "heads"),
        ({"length": 0}, "length"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
    ],
)
def test_options_that_make_no_model_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        SasrecOptions(**options)
