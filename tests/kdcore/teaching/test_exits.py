"""Early exits: the same answers as the whole network, row by row, and deep ends that teach shallow ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcore.teaching import DeepToShallowStep, ExitNetwork
from tests.kdcore.teaching.problems import FAST, accuracy, batch_of, blobs, fit, improves, kl, loss_of, score

DATA, HELD = blobs(120), blobs(90, seed=1)


class Watched(nn.Module):
    """A block that notes how many rows it was given."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.rows = block, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.rows += len(inputs)
        return self.block(inputs)


def exits(widths: tuple[int, ...] = (8, 8, 8), *, seed: int = 0) -> ExitNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks: list[nn.Module] = []
        before = 4
        for width in widths:
            blocks.append(nn.Sequential(nn.Linear(before, width), nn.BatchNorm1d(width), nn.ReLU()))
            before = width
        return ExitNetwork(blocks, [nn.Linear(width, 3) for width in widths])


@pytest.fixture(scope="module")
def taught() -> ExitNetwork:
    network = exits()
    fit(make(network), 4)
    return network.eval()


def make(network: ExitNetwork | None = None, **options: Any) -> DeepToShallowStep:
    return DeepToShallowStep(network or exits(), DATA, validate=accuracy(HELD), learning=FAST, **options)


def test_above_one_every_row_goes_to_the_end(taught: ExitNetwork) -> None:
    early = taught.answer_early(HELD["inputs"], 1.1)
    torch.testing.assert_close(early.logits, taught(HELD["inputs"]))
    assert early.exits.tolist() == [2] * 90 and early.exits.dtype == torch.int64


@pytest.mark.parametrize("threshold", [0.01, 0.5, 0.8, 0.95, 0.999, 1.0])
def test_every_row_has_the_answer_of_the_first_exit_that_is_sure(taught: ExitNetwork, threshold: float) -> None:
    early = taught.answer_early(HELD["inputs"], threshold)
    answers = [each.detach() for each in taught.all_exits(HELD["inputs"])]
    for row in range(90):
        sure = [number for number, each in enumerate(answers) if float(each[row].softmax(0).max()) >= threshold]
        wanted = sure[0] if sure else 2
        assert int(early.exits[row]) == wanted
        torch.testing.assert_close(early.logits[row], answers[wanted][row])


def test_later_blocks_run_on_open_rows_only(taught: ExitNetwork) -> None:
    watched = ExitNetwork([Watched(block) for block in taught.blocks], list(taught.heads)).eval()
    early = watched.answer_early(HELD["inputs"], 0.95)
    rows = [block.rows for block in watched.blocks]
    assert rows == [int((early.exits >= number).sum()) for number in range(3)]
    assert rows[0] == 90 > rows[1] > rows[2], "the threshold tests nothing unless rows leave at every exit"
    watched.blocks[1].rows = 0
    assert watched.answer_early(HELD["inputs"], 0.01).exits.tolist() == [0] * 90
    assert watched.blocks[1].rows == 0


def test_no_row_is_no_error_and_nothing_learns(taught: ExitNetwork) -> None:
    early = taught.answer_early(HELD["inputs"][:0], 0.5)
    assert early.logits.shape == (0, 3) and early.exits.shape == (0,)
    assert not taught.answer_early(HELD["inputs"], 0.5).logits.requires_grad


def test_terms_by_hand() -> None:
    step = make(soft=0.4, hint=0.1, temperature=2.0).eval()
    batch = batch_of(step)
    hidden, features, answers = batch["inputs"], [], []
    for block, head in zip(step.student.blocks, step.student.heads, strict=True):
        hidden = block(hidden)
        features.append(hidden)
        answers.append(head(hidden))
    labels = [F.cross_entropy(each, batch["labels"]) for each in answers]
    wanted = 0.6 * (labels[0] + labels[1]) + labels[2]
    wanted = wanted + 0.4 * sum(kl(answers[2], each, 2.0).mean() for each in answers[:2])
    wanted = wanted + 0.1 * sum((each - features[2]).square().mean() for each in features[:2])
    torch.testing.assert_close(loss_of(step, batch).double(), wanted.double(), rtol=1e-5, atol=1e-5)


def test_the_deep_end_is_taught_by_the_labels_alone() -> None:
    step = make().eval()
    terms = step(batch_of(step))
    deep = list(step.student.heads[2].parameters()) + list(step.student.blocks[2].parameters())
    for name in ("soft_targets", "hint"):
        found = torch.autograd.grad(terms[name], deep, allow_unused=True, retain_graph=True)
        assert all(each is None or not each.any() for each in found), name
        shallow = torch.autograd.grad(terms[name], [step.student.blocks[0][0].weight], retain_graph=True)[0]  # type: ignore[index]
        assert shallow.any(), name


def test_features_of_another_width_are_left_out() -> None:
    assert float(make(exits((5, 8, 8))).eval()(batch_of(make()))["hint"].detach()) > 0
    assert float(make(exits((5, 6, 8))).eval()(batch_of(make()))["hint"].detach()) == 0


def test_a_process_without_rows_adds_nothing() -> None:
    step = make().eval()
    nothing = step({name: rows[:0] for name, rows in batch_of(step).items()})
    assert {name: value.item() for name, value in nothing.items()} == dict.fromkeys(step.weights, 0.0)
    torch.stack(list(nothing.values())).sum().backward()


def test_trains_every_exit() -> None:
    network = exits()
    improves(make(network), HELD)
    for number in range(2):
        right = network.all_exits(HELD["inputs"])[number].argmax(1) == HELD["labels"]
        assert float(right.float().mean()) > 0.8
    assert score(network, HELD) > 0.8
    assert all(not module._forward_hooks for module in network.modules())


def test_what_does_not_fit_is_named(taught: ExitNetwork) -> None:
    block, head = nn.Linear(4, 4), nn.Linear(4, 3)
    for blocks, heads in (([block], [head]), ([block, block], [head])):
        with pytest.raises(ValueError, match=rf"heads: wanted one a block and at least 2, got 1 for {len(blocks)} bl"):
            ExitNetwork(blocks, heads)
    with pytest.raises(ValueError, match="training: wanted evaluation mode"):
        exits().answer_early(HELD["inputs"], 0.5)
    for threshold in (0.0, float("nan")):
        with pytest.raises(ValueError, match=r"threshold: wanted a probability > 0, got"):
            taught.answer_early(HELD["inputs"], threshold)
    for options in ({"soft": 1.0}, {"soft": -0.1}, {"hint": -1.0}):
        with pytest.raises(ValueError, match=r"soft, hint: wanted 0 <= soft < 1 and hint >= 0, got"):
            make(**options)
    with pytest.raises(ValueError, match=r"heads: wanted a linear classifier at the end, got Identity"):
        step = make(ExitNetwork([block, block], [nn.Identity(), head]))
        step(batch_of(step))
