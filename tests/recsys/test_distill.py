"""The teaching steps: every interaction and every position once an epoch, sums by hand, the same again after a kill."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.recsys import distill
from apps.recsys.distill import InteractionStep, Optimization, SequenceStep
from apps.recsys.evaluate import Evaluator
from apps.recsys.knowledge import KNOWLEDGE
from apps.recsys.models.factors import LightGCN, LightGCNOptions
from kdcore.config import UserError
from tests.recsys.knowledge.asked import table
from tests.recsys.made import factors, generator, history_of, lessons, sasrec, split

N_USERS, N_ITEMS, LENGTH = 12, 20, 4
SPLIT = split(N_USERS, N_ITEMS, longest=14)
EVALUATOR = Evaluator(SPLIT, "valid", ("ndcg@10",))
SMALL = {
    "ranking_distillation": {"length": 5, "sample": 8, "warm_up": 0},
    "collaborative_distillation": {"length": 8, "sample": 4, "sampling": "mixed"},
    "relaxed_ranking": {"length": 8, "interesting": 4, "uninteresting": 3},
    "item_relaxed_ranking": {"length": 5, "interesting": 3, "uninteresting": 2},
    "soft_targets": {},
    "sparse_soft_targets": {"length": 5},
    "distillation_experts": {"experts": 2},
    "item_distillation_experts": {"experts": 2},
}
BY_POSITION = [name for name, each in KNOWLEDGE.items() if not each.needs_user_vectors]


def taught(names, folder, teacher, **options):
    asked = lessons(teacher, SPLIT.train, folder, **options)
    return {name: (0.5, KNOWLEDGE[name](KNOWLEDGE[name].options_type(**own(name, options)), asked)) for name in names}


def own(name, options):
    """Ranks of a student are not kept by position."""
    return SMALL[name] | ({"sampling": "teacher"} if options and name == "collaborative_distillation" else {})


def interactions(folder=None, names=(), seed=0, **options) -> InteractionStep:
    knowledge = taught(names, folder, factors(N_USERS, N_ITEMS, 5, seed=9)) if names else None
    student = factors(N_USERS, N_ITEMS, 3, seed=seed)
    return InteractionStep(student, SPLIT.train, EVALUATOR, Optimization(**options), knowledge, 10)


def sequences(folder=None, names=(), train=SPLIT.train, batch_size=3) -> SequenceStep:
    knowledge = None
    if names:
        teacher = sasrec(N_USERS, N_ITEMS, length=LENGTH, seed=9)
        knowledge = taught(names, folder, teacher, by_position=True, context=LENGTH)
    student = sasrec(train.n_users, N_ITEMS, length=LENGTH)
    optimization = Optimization(loss="cross_entropy", batch_size=batch_size)
    return SequenceStep(student, train, EVALUATOR, optimization, knowledge, 10)


# -- factor models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "together"), [(7, 20), (7, 1), (7, 1000), (1000, 20)])
def test_every_interaction_once_an_epoch_with_unseen_negatives(batch_size, together, monkeypatch):
    monkeypatch.setattr(distill, "_DRAWN_TOGETHER", together)
    step = interactions(batch_size=batch_size, negatives=3)
    batches = list(step.batches(0, generator()))
    assert len(batches) == step.batch_count()
    assert sum(step.counts(batch)["bpr"] for batch in batches) == len(SPLIT.train)
    pairs = [pair for b in batches for pair in zip(b["user"].tolist(), b["positive"].tolist(), strict=True)]
    wanted = [(user, item) for user in range(N_USERS) for item in SPLIT.train.of(user).tolist()]
    assert sorted(pairs) == sorted(wanted)
    for batch in batches:
        assert batch["negative"].shape == (len(batch["user"]), 3)
        for user, negatives in zip(batch["user"].tolist(), batch["negative"].tolist(), strict=True):
            assert not set(negatives) & set(SPLIT.train.of(user).tolist())


@pytest.mark.parametrize("loss", ["bpr", "bce"])
def test_base_loss_is_the_formula_and_counts_make_it_a_mean_over_interactions(loss):
    step = interactions(loss=loss, negatives=2, batch_size=30)
    batch = next(iter(step.batches(0, generator())))
    scores = table(step.student).detach().numpy()
    total = 0.0
    for user, positive, negatives in zip(*(batch[n].tolist() for n in ("user", "positive", "negative")), strict=True):
        s, others = scores[user, positive], scores[user, negatives]
        if loss == "bpr":
            total += np.log1p(np.exp(-(s - others))).mean()
        else:
            total += np.log1p(np.exp(-s)) + np.log1p(np.exp(others)).sum()
    assert step(batch)[loss].item() == pytest.approx(total, rel=1e-5)
    assert step.counts(batch) == {loss: 30}


def test_knowledge_is_asked_for_the_users_and_items_of_the_batch(tmp_path):
    step = interactions(tmp_path, SMALL, batch_size=9)
    step.begin_epoch(0, generator(1))
    batch = next(iter(step.batches(0, generator())))
    users = sorted(set(batch["user"].tolist()))
    items = sorted(set(batch["positive"].tolist()) | set(batch["negative"].flatten().tolist()))
    counts = step.counts(batch)
    assert counts["bpr"] == 9
    for name in SMALL:
        wanted = items if name.startswith("item_") else users
        assert batch[f"{name}.queries"].tolist() == wanted
        assert counts[name] == len(wanted)
    assert step.weights == {"bpr": 1.0, **dict.fromkeys(SMALL, 0.5)}
    assert set(step(batch)) == set(step.weights)


@pytest.mark.parametrize("name", SMALL)
def test_the_same_interactions_with_and_without_a_teacher(tmp_path, name, monkeypatch):
    """The control of a claimed gain: what is drawn for the teacher must not move the student's own data."""
    monkeypatch.setattr(distill, "_DRAWN_TOGETHER", 20)  # two batches: more than one draw of negatives an epoch
    alone, with_teacher = interactions(batch_size=9), interactions(tmp_path, [name], batch_size=9)
    with_teacher.begin_epoch(0, generator(1))
    for epoch in range(2):
        pairs = zip(alone.batches(epoch, generator(epoch)), with_teacher.batches(epoch, generator(epoch)), strict=True)
        for one, two in pairs:
            assert all(torch.equal(one[part], two[part]) for part in one)


@pytest.mark.parametrize("world", [2, 5, 40])
def test_parts_of_a_batch_add_up_to_the_whole(tmp_path, world):
    """Also with more processes than rows; experts without their noise."""
    step = interactions(tmp_path, SMALL, batch_size=9)
    step.begin_epoch(0, generator(1))
    batch = next(iter(step.batches(0, generator())))
    step.eval()
    whole = step(batch)
    parts = [step(step.shard(batch, rank, world)) for rank in range(world)]
    for name in whole:
        torch.testing.assert_close(torch.stack([part[name] for part in parts]).sum(), whole[name])


@pytest.mark.parametrize("name", SMALL)
def test_every_knowledge_moves_the_student_and_only_what_it_trains(tmp_path, name):
    step = interactions(tmp_path, [name], batch_size=9)
    step.begin_epoch(0, generator(1))
    step(next(iter(step.batches(0, generator()))))[name].backward()
    assert any(p.grad is not None and p.grad.any() for p in step.student.parameters())
    trained = {id(p) for group in step.optimizer().param_groups for p in group["params"]}
    assert trained == {id(p) for p in step.parameters()}
    extra = sum(p.numel() for p in step.parameters()) - sum(p.numel() for p in step.student.parameters())
    assert (extra > 0) == ("experts" in name)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_resumed_epoch_has_the_same_batches(tmp_path, sequential):
    """Resume loads the state and draws the epoch's batches again, without ``begin_epoch``."""
    names = BY_POSITION if sequential else list(SMALL)
    make = sequences if sequential else interactions
    first = make(tmp_path, names)
    first.begin_epoch(3, generator(1))
    whole = list(first.batches(3, generator()))
    second = make(tmp_path, names)
    second.load_state_dict(first.state_dict())
    second.begin_epoch = None  # type: ignore[method-assign, assignment]
    again = list(second.batches(3, generator()))
    assert len(whole) == len(again)
    for one, two in zip(whole, again, strict=True):
        assert list(one) == list(two)
        assert all(torch.equal(one[part], two[part]) for part in one)


def test_the_seed_decides_the_batches():
    step = interactions()
    first, again, other = (next(iter(step.batches(0, generator(seed)))) for seed in (0, 0, 1))
    assert torch.equal(first["positive"], again["positive"])
    assert torch.equal(first["negative"], again["negative"])
    assert not torch.equal(first["positive"], other["positive"])


def test_a_user_with_every_item_and_a_user_with_none_break_nothing(tmp_path):
    train = history_of([list(range(N_ITEMS)), [], [3]], N_ITEMS)
    asked = lessons(factors(3, N_ITEMS, seed=1), train, tmp_path)
    knowledge = {name: (1.0, KNOWLEDGE[name](KNOWLEDGE[name].options_type(**SMALL[name]), asked)) for name in SMALL}
    step = InteractionStep(factors(3, N_ITEMS, 3), train, EVALUATOR, Optimization(), knowledge, 5)
    step.begin_epoch(0, generator(1))
    for batch in step.batches(0, generator()):
        assert 1 not in batch["user"]
        total = torch.stack(list(step(batch).values())).sum()
        total.backward()
        assert torch.isfinite(total)
    assert all(torch.isfinite(p.grad).all() for p in step.student.parameters())


def test_validation_of_a_graph_model_is_that_of_its_finalized_vectors():
    model = LightGCN(SPLIT.train, LightGCNOptions(dimension=3, layers=2, scale=1.0))
    step = InteractionStep(model, SPLIT.train, EVALUATOR, Optimization())
    assert step.validate() == EVALUATOR(model.finalize()).values


# -- sequential models -------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 17), min_size=1, max_size=6), st.integers(0, 10_000))
def test_every_position_with_a_target_is_predicted_once_from_a_slice_of_the_history(lengths, seed):
    """Windows are pieces of one user's history in order, no longer than the model reads."""
    rng = np.random.default_rng(seed)
    train = history_of([rng.integers(N_ITEMS, size=length).tolist() for length in lengths], N_ITEMS)
    if max(lengths) < 2:
        with pytest.raises(UserError, match="two items"):
            sequences(train=train)
        return
    step = sequences(train=train)
    start, sizes = step._cut(generator(seed))
    assert sizes.min() >= 2
    assert sizes.max() <= LENGTH + 1
    owner = np.searchsorted(train.indptr, start, side="right") - 1
    assert (start + sizes <= train.indptr[owner + 1]).all()
    targets = np.concatenate([np.arange(s + 1, s + n) for s, n in zip(start, sizes, strict=True)])
    wanted = np.setdiff1d(np.arange(len(train)), train.indptr[:-1])
    assert sorted(targets.tolist()) == wanted.tolist()
    assert step.positions == len(wanted)


def test_batches_hold_all_windows_and_the_cuts_move():
    step = sequences()
    seen = []
    for epoch in range(2):
        batches = list(step.batches(epoch, generator(epoch)))
        assert abs(len(batches) - step.batch_count()) <= N_USERS
        assert all(1 <= len(batch["windows"]) <= 3 for batch in batches)
        windows = [
            tuple(item for item in row if item < N_ITEMS) for batch in batches for row in batch["windows"].tolist()
        ]
        assert sum(len(window) - 1 for window in windows) == step.positions
        seen.append(sorted(windows))
    assert seen[0] != seen[1]


def test_forward_is_the_cross_entropy_of_each_position_encoded_alone(tmp_path):
    """With a teacher and without (which takes another path), loss and gradient."""
    for names in ((), ("sparse_soft_targets",)):
        step = sequences(tmp_path, names)
        step.eval()
        batch = next(iter(step.batches(0, generator())))
        got = step(batch)["cross_entropy"]
        got.backward()
        gradients = [p.grad.clone() for p in step.student.parameters()]
        step.zero_grad()
        total, positions, student = torch.zeros(()), 0, step.student
        for row in batch["windows"].tolist():
            items = [item for item in row if item < N_ITEMS]
            for place in range(1, len(items)):
                state = student.hidden(torch.tensor([items[:place]]))[0, -1]
                total = total - torch.log_softmax(student.item[:N_ITEMS] @ state, 0)[items[place]]
                positions += 1
        assert step.counts(batch) == dict.fromkeys(step.weights, positions)
        torch.testing.assert_close(got, total)
        total.backward()
        for value, parameter in zip(gradients, student.parameters(), strict=True):
            torch.testing.assert_close(value, parameter.grad, atol=1e-5, rtol=1e-4)


def test_a_query_is_the_place_of_the_last_item_its_answer_may_know(tmp_path):
    step = sequences(tmp_path, ["sparse_soft_targets"])
    for batch in step.batches(0, generator()):
        queries = iter(batch["sparse_soft_targets.queries"].tolist())
        for row in batch["windows"].tolist():
            items = [item for item in row if item < N_ITEMS]
            for place in range(len(items) - 1):
                asked = next(queries)
                assert SPLIT.train.items[asked] == items[place]
                assert SPLIT.train.items[asked + 1] == items[place + 1]
        assert next(queries, None) is None


def test_a_teacher_is_matched_at_the_very_position_it_was_asked_about(tmp_path):
    """A student equal to its teacher, in whole windows: nothing to learn, whatever the order of the batch."""
    train = history_of([SPLIT.train.of(user)[: LENGTH + 1].tolist() for user in range(N_USERS)], N_ITEMS)
    teacher = sasrec(N_USERS, N_ITEMS, length=LENGTH)
    asked = lessons(teacher, train, tmp_path, by_position=True, context=LENGTH)
    kind = KNOWLEDGE["sparse_soft_targets"]
    knowledge = {"sparse_soft_targets": (1.0, kind(kind.options_type(length=6), asked))}
    optimization = Optimization(loss="cross_entropy", batch_size=3)
    step = SequenceStep(teacher, train, EVALUATOR, optimization, knowledge, 5).eval()
    for batch in step.batches(0, generator()):
        assert abs(step(batch)["sparse_soft_targets"].item()) < 1e-4


@pytest.mark.parametrize("world", [2, 3, 7])
def test_parts_of_a_batch_of_windows_add_up_to_the_whole(tmp_path, world):
    step = sequences(tmp_path, BY_POSITION, batch_size=6)
    step.begin_epoch(0, generator(1))
    step.eval()
    for batch in step.batches(0, generator()):
        whole = step(batch)
        assert set(whole) == {"cross_entropy", *BY_POSITION}
        parts = [step(step.shard(batch, rank, world)) for rank in range(world)]
        for name in whole:
            torch.testing.assert_close(torch.stack([part[name] for part in parts]).sum(), whole[name])


def test_the_same_windows_with_and_without_a_teacher(tmp_path):
    pairs = zip(
        sequences().batches(0, generator()), sequences(tmp_path, BY_POSITION).batches(0, generator()), strict=True
    )
    for one, two in pairs:
        assert torch.equal(one["windows"], two["windows"])


@pytest.mark.parametrize(
    "values", [{"loss": "hinge"}, {"batch_size": 0}, {"negatives": 0}, {"learning_rate": 0.0}, {"weight_decay": -1.0}]
)
def test_optimization_out_of_range_is_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Optimization(**values)
