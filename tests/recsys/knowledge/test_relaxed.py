"""Relaxed ranking for users and for items: what is drawn, and the loss term by term from the paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from apps.recsys.knowledge import relaxed
from apps.recsys.knowledge.relaxed import (
    ItemRelaxedRanking,
    ItemRelaxedRankingOptions,
    RelaxedRanking,
    RelaxedRankingOptions,
)
from kdcore.config import UserError
from tests.recsys.knowledge.asked import summed, table
from tests.recsys.made import factors, generator, histories, history_of, lessons, prefixes, sasrec

N_USERS, N_ITEMS = 14, 25
USERS = torch.tensor([0, 1, 2, 6, 13])


@pytest.fixture
def train():
    """User 0 has nothing, user 1 all but 4 items (fewer than a list holds), user 2 everything; item 24 everybody."""
    own = [[24, *items] for items in map(np.ndarray.tolist, map(histories(N_USERS, 24).of, range(N_USERS)))]
    own[0], own[1], own[2] = [24], [*range(20), 24], list(range(N_ITEMS))
    return history_of(own, N_ITEMS)


def plackett_luce(interesting: list[float], uninteresting: list[float]) -> float:
    """-sum_k [ s_k - log( sum_{j >= k} exp s_j + sum_l exp s_l ) ]"""
    rest = sum(np.exp(uninteresting))
    return -sum(s - np.log(sum(np.exp(interesting[place:])) + rest) for place, s in enumerate(interesting))


@pytest.mark.parametrize("sampling", ["exp", "none"])
def test_user_side_is_the_formula(tmp_path, train, sampling):
    teacher, student = factors(N_USERS, N_ITEMS, seed=1), factors(N_USERS, N_ITEMS)
    asked = lessons(teacher, train, tmp_path)
    options = RelaxedRankingOptions(length=10, interesting=6, uninteresting=5, temperature=4.0, sampling=sampling)
    knowledge = RelaxedRanking(options, asked)
    knowledge.draw(generator())
    prepared = knowledge.prepare(USERS, generator(1))
    wanted, scores, taught = 0.0, table(student).detach().numpy(), table(teacher).detach().numpy()
    for row, user in enumerate(USERS.tolist()):
        seen = set(train.of(user).tolist())
        listed = sorted(set(range(N_ITEMS)) - seen, key=lambda item: -taught[user, item])[:10]
        chosen = prepared["interesting"][row][prepared["mask"][row]].tolist()
        others = prepared["uninteresting"][row].tolist()
        # in the teacher's order and without repeats
        assert chosen == [item for item in listed if item in set(chosen)]
        if sampling == "none":
            assert chosen == listed[:6]
        elif len(listed) == 10:
            assert len(chosen) == 6
        assert not set(chosen) & seen
        if user not in (1, 2):
            assert not set(others) & (seen | set(listed))
        elif user == 1:
            assert not set(others) & seen  # nothing is left outside the list, but what was had is no bad example
        wanted += plackett_luce(scores[user, chosen].tolist(), scores[user, others].tolist())
    got = summed(knowledge, student, USERS, prepared)
    assert got.item() == pytest.approx(wanted, rel=1e-5)
    got.backward()
    assert not student.user.grad[2].any()
    assert student.user.grad[0].any()


@pytest.mark.parametrize("sampling", ["exp", "none"])
def test_item_side_is_the_formula_with_users_in_the_lists(tmp_path, train, sampling):
    """Item 24 every user has: it has no list. Item 20 has enough users left for both parts."""
    teacher, student = factors(N_USERS, N_ITEMS, seed=1), factors(N_USERS, N_ITEMS)
    asked = lessons(teacher, train, tmp_path)
    options = ItemRelaxedRankingOptions(length=5, interesting=3, uninteresting=4, temperature=4.0, sampling=sampling)
    knowledge = ItemRelaxedRanking(options, asked)
    knowledge.draw(generator())
    items = torch.tensor([24, 3, 20, 11])
    prepared = knowledge.prepare(items, generator(1))
    wanted, scores, taught = 0.0, table(student).detach().numpy(), table(teacher).detach().numpy()
    for row, item in enumerate(items.tolist()):
        owners = {user for user in range(N_USERS) if item in train.of(user)}
        listed = sorted(set(range(N_USERS)) - owners, key=lambda user: -taught[user, item])[:5]
        chosen = prepared["interesting"][row][prepared["mask"][row]].tolist()
        others = prepared["uninteresting"][row].tolist()
        assert chosen == [user for user in listed if user in set(chosen)]
        if N_USERS - len(owners) > 5:
            assert not set(others) & (owners | set(listed))
            assert len(chosen) == 3
        wanted += plackett_luce(scores[chosen, item].tolist(), scores[others, item].tolist())
    assert not prepared["mask"][0].any()
    assert summed(knowledge, student, items, prepared).item() == pytest.approx(wanted, rel=1e-5)


def test_high_ranks_are_drawn_more_often_and_fresh_every_epoch(tmp_path):
    """p(rank) ~ exp(-rank / T): the first of 20 with T = 3 against the tenth, over many epochs."""
    asked = lessons(factors(50, 30), history_of([[]] * 50, 30), tmp_path)
    knowledge = RelaxedRanking(RelaxedRankingOptions(length=20, interesting=1, temperature=3.0), asked)
    listed = torch.from_numpy(asked.lists(20).items.astype(np.int64))
    counts, g, before = torch.zeros(20), generator(), None
    for _ in range(60):
        knowledge.draw(g)
        drawn = knowledge.prepare(torch.arange(50), g)["interesting"]
        assert before is None or not torch.equal(before, drawn)
        counts += (listed == drawn).sum(dim=0)
        before = drawn
    wanted = torch.softmax(-torch.arange(20) / 3.0, dim=0) * 3000
    assert ((counts - wanted).square() / wanted).sum() < 19 + 5 * 38**0.5


def test_an_epoch_has_one_draw_a_user(tmp_path, train):
    knowledge = RelaxedRanking(
        RelaxedRankingOptions(length=10, interesting=3), lessons(factors(N_USERS, N_ITEMS), train, tmp_path)
    )
    knowledge.draw(generator())
    first, second = knowledge.prepare(USERS, generator(1)), knowledge.prepare(USERS.flip(0), generator(2))
    assert all(torch.equal(first[name], second[name].flip(0)) for name in first)
    knowledge.draw(generator())  # what a resumed run does
    again = knowledge.prepare(USERS, generator(3))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_lists_are_drawn_in_blocks(tmp_path, train, monkeypatch):
    monkeypatch.setattr(relaxed, "_DRAW_ROWS", 4)
    teacher = factors(N_USERS, N_ITEMS)
    knowledge = RelaxedRanking(
        RelaxedRankingOptions(length=10, sampling="none", interesting=10), lessons(teacher, train, tmp_path)
    )
    knowledge.draw(generator())
    prepared = knowledge.prepare(torch.arange(N_USERS), generator())
    assert torch.equal(prepared["interesting"].int(), torch.tensor(knowledge.lessons.lists(10).items))
    assert len(prepared["uninteresting"]) == N_USERS


def test_a_catalogue_smaller_than_the_list_never_gives_what_was_had_as_a_bad_example(tmp_path):
    train = histories(10, 8, longest=6, shortest=1)
    knowledge = RelaxedRanking(RelaxedRankingOptions(), lessons(factors(10, 8), train, tmp_path))
    knowledge.draw(generator())
    prepared = knowledge.prepare(torch.arange(10), generator())
    for user in range(10):
        assert not set(prepared["uninteresting"][user].tolist()) & set(train.of(user).tolist())
        assert prepared["mask"][user].sum() == 8 - len(train.of(user))


def test_one_item(tmp_path):
    student = factors(2, 1)
    knowledge = RelaxedRanking(RelaxedRankingOptions(), lessons(factors(2, 1), history_of([[0], []], 1), tmp_path))
    knowledge.draw(generator())
    loss = summed(knowledge, student, torch.arange(2), knowledge.prepare(torch.arange(2), generator()))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.item.grad).all()


def test_by_position_lists_belong_to_the_place(tmp_path):
    """As many places as users would once have passed for one list a user."""
    train = history_of([[0, 1, 2, 3], [4], [5], [], [], []], 30)
    asked = lessons(sasrec(6, 30), train, tmp_path, by_position=True)
    assert asked.n_queries == train.n_users
    knowledge = RelaxedRanking(RelaxedRankingOptions(length=9, interesting=4, uninteresting=50), asked)
    knowledge.draw(generator())
    places = torch.arange(6)
    prepared = knowledge.prepare(places, generator())
    for place, (user, _) in enumerate(prefixes(train, 5)):
        listed = asked.lists(9).items[place].tolist()
        assert set(prepared["interesting"][place].tolist()) <= set(listed)
        assert not set(prepared["uninteresting"][place].tolist()) & (set(train.of(user).tolist()) | set(listed))


def test_an_item_side_wants_user_vectors(tmp_path):
    asked = lessons(sasrec(5, 9), histories(5, 9, shortest=2), tmp_path, by_position=True)
    with pytest.raises(UserError, match="a vector a user"):
        ItemRelaxedRanking(ItemRelaxedRankingOptions(), asked)


@pytest.mark.parametrize("values", [{"interesting": 0}, {"temperature": 0.0}, {"sampling": "log"}, {"length": 0}])
def test_options_out_of_range_are_refused(values):
    for options in (RelaxedRankingOptions, ItemRelaxedRankingOptions):
        with pytest.raises(ValueError, match=next(iter(values))):
            options(**values)
