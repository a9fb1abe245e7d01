"""Draws of unseen items: never a seen one, uniform over the rest, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.recsys import sampling
from apps.recsys.sampling import Membership, sample_unseen
from tests.recsys.made import generator, histories, history_of


@pytest.fixture(params=["bitmap", "keys"])
def form(request, monkeypatch):
    if request.param == "keys":
        monkeypatch.setattr(sampling, "_BITMAP_CELLS", 0)
    return request.param


def test_membership_equals_looking_it_up(form):
    train = histories(15, 23, longest=20)
    seen = Membership(train)
    assert (seen._bitmap is None) == (form == "keys")
    users = torch.arange(15)[:, None]
    wanted = [[item in set(train.of(user).tolist()) for item in range(23)] for user in range(15)]
    assert seen.has(users, torch.arange(23)[None]).tolist() == wanted


def test_both_forms_draw_the_same(monkeypatch):
    train, users = histories(15, 23, longest=20), torch.arange(15).repeat(4)
    small = sample_unseen(Membership(train), users, 5, generator())
    monkeypatch.setattr(sampling, "_BITMAP_CELLS", 0)
    assert torch.equal(small, sample_unseen(Membership(train), users, 5, generator()))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 6)), min_size=1, max_size=6),
    st.integers(1, 9),
    st.integers(0, 1000),
    st.booleans(),
)
def test_draws_are_outside_what_is_seen_and_avoided_while_anything_is(seen, n, seed, avoiding):
    """Histories of 0..7 of the 7 items: some users have everything, to some nothing is left beside ``avoid``."""
    train = history_of([sorted(own) for own in seen], 7)
    users = torch.arange(len(seen)).flip(0)
    avoid = torch.randint(7, (len(seen), 3), generator=generator(seed)) if avoiding else None
    drawn = sample_unseen(Membership(train), users, n, generator(seed), avoid)
    assert drawn.shape == (len(seen), n)
    for row, user in enumerate(users.tolist()):
        unseen = set(range(7)) - seen[user]
        free = unseen - set(avoid[row].tolist()) if avoid is not None else unseen
        assert set(drawn[row].tolist()) <= (free or unseen or set(range(7)))


def test_every_free_item_is_as_likely():
    """A chi-square test on both ways of drawing: by rejection, and exactly for a user with 2 of 40 left."""
    train = history_of([[0, 1, 2, 3], list(range(37))], 40)
    avoid = torch.tensor([[10, 11], [37, 37]])
    drawn = sample_unseen(Membership(train), torch.arange(2), 40_000, generator(), avoid)
    for row, free in enumerate([36 - 2, 2]):
        counts = np.bincount(drawn[row], minlength=40)
        counts = counts[counts > 0]
        assert len(counts) == free
        expected = 40_000 / free
        assert ((counts - expected) ** 2 / expected).sum() < free - 1 + 5 * np.sqrt(2 * free)


def test_rows_of_one_user_avoid_different_items():
    """Queries of a sequential student: many rows of one user, each with a list of its own."""
    train = history_of([[0], []], 4)
    avoid = torch.tensor([[1, 2], [2, 3], [1, 3]])
    drawn = sample_unseen(Membership(train), torch.tensor([0, 0, 0]), 20, generator(), avoid)
    assert [set(row.tolist()) for row in drawn] == [{3}, {1}, {2}]


def test_exact_draws_do_not_depend_on_the_block(monkeypatch):
    train = history_of([list(range(9))] * 6, 10)
    whole = sample_unseen(Membership(train), torch.arange(6), 30, generator())
    monkeypatch.setattr(sampling, "_EXACT_CELLS", 1)
    assert torch.equal(whole, sample_unseen(Membership(train), torch.arange(6), 30, generator()))
    assert set(whole.flatten().tolist()) == {9}


def test_one_item_catalogue():
    train = history_of([[0], []], 1)
    assert sample_unseen(Membership(train), torch.arange(2), 3, generator()).tolist() == [[0] * 3] * 2


def test_seed_decides():
    seen = Membership(histories())
    first, again, other = (sample_unseen(seen, torch.arange(12), 8, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
