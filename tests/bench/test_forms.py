"""The study of the forms of knowledge: it covers everything, and what it feeds the losses is right."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("sklearn")

from benchmarks import knowledge_forms as study_script
from benchmarks.forms import data, nbest
from benchmarks.forms.losses import forms, taught
from benchmarks.forms.networks import Network, network, strip_accuracy
from benchmarks.forms.page import page, verdict
from benchmarks.forms.study import Study, fit
from benchmarks.forms.ways import WAYS
from kdcore.config import UserError
from kdcore.losses import entries
from kdcore.teaching import teaching_entries


def test_every_loss_and_every_way_is_in_the_study() -> None:
    assert set(forms()) == {row.name for row in entries()}
    assert {name.split(" (")[0] for name in WAYS} == {row.name for row in teaching_entries()}


def test_splits_share_no_row_and_differ_by_seed() -> None:
    first, other = data.split("digits", 0), data.split("digits", 1)
    parts = [first.train, first.valid, first.test]
    assert [len(part["labels"]) for part in parts] == [400, 300, 1097]
    assert sum(len(part["labels"]) for part in parts) == len(data.load("digits")[1])
    assert not torch.equal(first.train["labels"], other.train["labels"])
    assert first.train["inputs"].min() >= 0 and first.train["inputs"].max() == 1


def test_strips_are_their_digits_side_by_side() -> None:
    part = data.split("digits", 0).test
    made = data.strips(part, 20, 3, 5)
    assert made["inputs"].shape == (20, 1, 8, 24)
    for strip, labels in zip(made["inputs"], made["labels"], strict=True):
        for place, label in enumerate(labels.tolist()):
            digit = strip[:, :, 8 * place : 8 * place + 8]
            assert (part["labels"][(part["inputs"] == digit).flatten(1).all(1)] == label - 1).all()


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"\0\0\x08\x03", "not an IDX file"),
        (b"\0\0\x0d\x03" + b"\0" * 20, "not an IDX file"),
        (b"\0\0\x08\x03" + b"\0\0\0\x02" * 3 + b"\0" * 7, r"holds 7 bytes, its head says \(2, 2, 2\)"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: bytes, said: str) -> None:
    monkeypatch.setenv("KD_DATA", str(tmp_path))
    with pytest.raises(UserError, match="set KD_DATA"):
        data.load("mnist")
    folder = tmp_path / "multimodal" / "mnist"
    folder.mkdir(parents=True)
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(raw))
    with pytest.raises(UserError, match=said):
        data.load("mnist")


def test_n_best_is_the_best_of_all_sequences() -> None:
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)) * 2
    got = nbest.of_rows(logits, 3)
    for b in range(2):
        log_p = torch.log_softmax(logits[b], 1)
        mass: dict[tuple[int, ...], float] = {}
        for path in itertools.product(range(4), repeat=3):
            labels = tuple(s for i, s in enumerate(path) if s and (i == 0 or s != path[i - 1]))
            mass[labels] = mass.get(labels, 0.0) + float(sum(log_p[t, s] for t, s in enumerate(path)).exp())
        for n in range(3):
            labels = tuple(got["hypotheses"][b, n, : got["hypothesis_lengths"][b, n]].tolist())
            assert got["log_scores"][b, n].item() == pytest.approx(np.log(mass[labels]), abs=1e-4)
        best = max(mass, key=mass.get)
        assert tuple(got["hypotheses"][b, 0, : got["hypothesis_lengths"][b, 0]].tolist()) == best
    halves = nbest.of_halves(torch.randn(2, 6, 4), 2)
    assert halves["segments"].tolist() == [[[0, 3], [3, 6]]] * 2


def test_strips_are_read_by_their_best_path() -> None:
    class Says(torch.nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            paths = torch.tensor([[1, 1, 0, 1, 2, 0], [3, 0, 3, 3, 0, 1], [1, 2, 3, 4, 0, 0]])
            return F.one_hot(paths, 5).float()

    part = {"inputs": torch.zeros(3, 1), "labels": torch.tensor([[1, 1, 2], [3, 3, 1], [1, 2, 3]])}
    assert strip_accuracy(Says(), part) == pytest.approx(2 / 3)


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.setattr("benchmarks.forms.study.EPOCHS", {"digits": 1})
    return Study("digits", 0, tmp_path)


@pytest.mark.parametrize("name", ["soft_targets", "contrastive_representation", "jacobian_matching", "sequence_ctc"])
def test_a_form_is_taught_at_its_strength(study: Study, name: str) -> None:
    form = forms()[name]
    step = taught(study, form, 0.5)
    first = next(iter(step.terms.weights))
    rows = {key: values[:64] for key, values in step.data.items()}
    step.eval()
    torch.manual_seed(study.seed)
    values = step({"index": torch.arange(64), **rows})
    size = float(values[name].detach()) * step.terms.weights[name]
    assert size == pytest.approx(0.5 * float(values[first].detach()), rel=0.2)
    before = {key: value.clone() for key, value in step.student.state_dict().items()}
    fit(step, 0, 1)
    assert any(not torch.equal(value, before[key]) for key, value in step.student.state_dict().items())


def test_teachers_are_kept(study: Study) -> None:
    first = study.teacher
    again = Study("digits", 0, study.folder).teacher
    assert isinstance(again, Network) and not again.training
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(network((2, 4, 4), 3).head.weight, network((2, 4, 4), 3).head.weight)


def test_results_survive_a_torn_line(tmp_path: Path) -> None:
    task = study_script.Task("digits", 0, "alone", "alone", 0.01)
    study_script.Results(tmp_path).add(task, {"valid": 0.5, "test": 0.4})
    with (tmp_path / "results.jsonl").open("a") as out:
        out.write('{"key": "digits/al')
    found = study_script.Results(tmp_path)
    assert found.done[task.key]["test"] == 0.4 and len(found.done) == 1


def test_the_page_says_what_the_intervals_say() -> None:
    def row(name: str, value: float, half: float) -> dict:
        change = {"value": value, "low": value - half, "high": value + half}
        both = {"student": [0.9 + value] * 2, "alone": [0.9] * 2, "difference": change}
        return {"name": name, "family": "response", "task": "images", "note": "", "teacher": [0.95] * 2, **both}

    rows = [row("soft_targets", 0.02, 0.01), row("bpr", -0.03, 0.01), row("hint", 0.01, 0.02)]
    way = {**rows[0], "name": "mutual_learning", "metric": "accuracy", "control": "student alone"}
    part = {"losses": rows, "ways": [way], "learning_rates": {"alone": 0.01, "strips alone": 0.01}}
    about = {"seeds": [0, 1], "seeds_of_ways": [0], "strengths": [0.1, 2.0], "provenance": {"command": ["python", "x"]}}
    text = page({**about, "data": {"digits": part}})
    assert "2 seeds (1 for ways of teaching)" in text
    assert [verdict(each["difference"]) for each in rows] == ["helps", "harms", "-"]
    assert "* Help here: `soft_targets`." in text and "* Harm here: `bpr`." in text
    assert "| `soft_targets` | response | 90.0 | 92.0 | +2.0 [+1.0, +3.0] | **helps** |" in text
    assert "teacher 95.0 %, student alone 90.0 % at learning rate 0.01" in text
