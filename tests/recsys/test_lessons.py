"""What a teacher is asked, against asking it the slow way: user by user, prefix by prefix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from apps.recsys import lessons as lessons_module
from apps.recsys.lessons import reads_histories
from apps.recsys.models.ensemble import Ensemble
from apps.recsys.models.linear import Ease, EaseOptions
from kdcore.config import UserError
from tests.recsys.made import Table, factors, histories, history_of, lessons, prefixes, sasrec


def best_first(scores: np.ndarray, excluded: np.ndarray, k: int) -> tuple[list[int], list[float]]:
    """The definition: by score, then by number; what is excluded ends as item 0 with -inf."""
    order = [i for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i)) if i not in set(excluded.tolist())]
    missing = k - len(order[:k])
    return order[:k] + [0] * missing, [float(scores[i]) for i in order[:k]] + [-np.inf] * missing


def test_lists_are_the_best_unobserved_items_of_every_user(tmp_path):
    """User 0 has had everything, user 1 all but two, user 2 nothing; scores have ties."""
    lists = [list(range(8)), list(range(6)), []] + [[1, 2]] * 5
    train = history_of(lists, 8)
    scores = torch.randint(3, (8, 8), generator=torch.Generator().manual_seed(0)).float()
    got = lessons(Table(scores), train, tmp_path).lists(4)
    for user in range(8):
        items, values = best_first(scores[user].numpy(), train.of(user), 4)
        assert got.items[user].tolist() == items
        assert got.scores[user].tolist() == values


def test_a_list_longer_than_the_catalogue_ends_early(tmp_path):
    got = lessons(Table(torch.tensor([[2.0, 1.0]])), history_of([[]], 2), tmp_path).lists(5)
    assert got.items.tolist() == [[0, 1, 0, 0, 0]]
    assert np.isfinite(got.scores).tolist() == [[True, True, False, False, False]]


@pytest.fixture
def sequential(tmp_path):
    """More places in the log than users, one user without a history, some longer than the context."""
    train = histories(7, 12, longest=11, shortest=3, seed=4)
    train = history_of([[], *(train.of(user).tolist() for user in range(7)), []], 12)
    teacher = sasrec(9, 12, length=4)
    return teacher, train, lessons(teacher, train, tmp_path, by_position=True, context=4)


def asked_one_by_one(teacher, train, context):
    with torch.no_grad():
        answers = [
            teacher.scores(torch.tensor([0]), history_of([items.tolist()], train.n_items))[0]
            for _, items in prefixes(train, context)
        ]
    return torch.stack(answers)


def test_lists_by_position_equal_asking_for_each_prefix(sequential):
    teacher, train, asked = sequential
    got, wanted = asked.lists(5), asked_one_by_one(teacher, train, 4).numpy()
    assert asked.n_queries == len(train) > train.n_users
    for place, (_, items) in enumerate(prefixes(train, 4)):
        listed, _ = best_first(wanted[place], items, 5)
        assert got.items[place].tolist() == listed
    np.testing.assert_allclose(
        got.scores, np.take_along_axis(wanted, got.items.astype(np.int64), 1), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("queries", [512, 3])
def test_log_probabilities_by_position_equal_asking_for_each_prefix(sequential, queries, monkeypatch):
    monkeypatch.setattr(lessons_module, "_ANSWER_QUERIES", queries)
    teacher, train, asked = sequential
    got = asked.log_probabilities(6, 2.0)
    scores = asked_one_by_one(teacher, train, 4)
    kept, items = torch.log_softmax(scores / 2.0, dim=1).topk(6, dim=1)
    assert got.items.tolist() == items.tolist()
    np.testing.assert_allclose(got.scores, kept, rtol=1e-5)


def test_full_scores_by_position_equal_asking_for_each_prefix(sequential):
    teacher, train, asked = sequential
    np.testing.assert_allclose(asked.full_scores(), asked_one_by_one(teacher, train, 4), rtol=1e-4, atol=1e-5)


def test_user_of_a_place_is_its_owner(sequential):
    _, train, asked = sequential
    assert asked.user_of(torch.arange(len(train))).tolist() == [user for user, _ in prefixes(train, 4)]


def test_answers_do_not_depend_on_the_mode_the_teacher_was_left_in(sequential, tmp_path):
    teacher, train, asked = sequential
    calm = asked.log_probabilities(3, 1.0)
    other = lessons(teacher.train(), train, tmp_path / "other", by_position=True, context=4)
    assert np.array_equal(calm.scores, other.log_probabilities(3, 1.0).scores)
    assert teacher.training


def test_user_lists_are_the_best_users_without_the_item(tmp_path):
    """Item 0 everybody has; scores have ties, which go to the lower user whatever the block."""
    train = history_of([[0, *own.tolist()] for own in map(histories(9, 6, longest=4).of, range(9))], 7)
    scores = torch.randint(3, (9, 7), generator=torch.Generator().manual_seed(0)).float()
    got = lessons(Table(scores), train, tmp_path).user_lists(5)
    for item in range(7):
        owners = np.array([user for user in range(9) if item in train.of(user)])
        users, values = best_first(scores[:, item].numpy(), owners, 5)
        finite = np.isfinite(values)
        assert got.items[item][finite].tolist() == np.array(users)[finite].tolist()
        assert got.scores[item].tolist() == values


def test_user_lists_in_small_blocks(tmp_path):
    """More users than one block of the real size takes, so that lists are merged."""
    scores = torch.randn(2500, 3, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    got = lessons(Table(scores), history_of([[]] * 2500, 3), tmp_path).user_lists(40)
    for item in range(3):
        assert got.items[item].tolist() == best_first(scores[:, item].numpy(), np.array([]), 40)[0]


def test_answers_are_kept_and_belong_to_one_teacher(tmp_path, monkeypatch):
    train, first, second = histories(), factors(12, 20), factors(12, 20, seed=1)
    before = lessons(first, train, tmp_path).lists(5).items.copy()
    assert not np.array_equal(lessons(second, train, tmp_path).lists(5).items, before)
    assert not np.array_equal(lessons(first, histories(seed=1), tmp_path).lists(5).items, before)

    def refuse(*args):
        raise AssertionError("asked again")

    monkeypatch.setattr(first, "user_vectors", refuse)
    assert np.array_equal(lessons(first, train, tmp_path).lists(5).items, before)
    with pytest.raises(AssertionError, match="asked again"):
        lessons(first, train, tmp_path).lists(6)


def test_temperatures_close_together_are_not_mixed_up(tmp_path):
    asked = lessons(factors(12, 20), histories(), tmp_path)
    near, far = asked.log_probabilities(3, 1.0), asked.log_probabilities(3, 1.0000004)
    assert not np.array_equal(near.scores, far.scores)


def test_only_teachers_that_answer_from_histories_teach_sequential_students(tmp_path):
    train = histories(6, 10, shortest=2)
    sequence, ease = sasrec(6, 10), Ease.fit(train, EaseOptions(1.0))
    assert reads_histories(sequence)
    assert reads_histories(Ensemble([sequence, ease]))
    # a factor model among the members would answer for user r where prefix r is meant
    for teacher in (factors(6, 10), Ensemble([sequence, factors(6, 10)])):
        with pytest.raises(UserError, match="answers from any history"):
            lessons(teacher, train, tmp_path, by_position=True)


def test_what_a_teacher_cannot_give_is_a_user_error(tmp_path, monkeypatch):
    train = histories(6, 10)
    asked = lessons(Ease.fit(train, EaseOptions(1.0)), train, tmp_path)
    with pytest.raises(UserError, match="no user and item vectors"):
        asked.vectors()
    monkeypatch.setattr(lessons_module, "_FULL_SCORE_BYTES", 100)
    with pytest.raises(UserError, match="sparse_soft_targets"):
        asked.full_scores()
