"""The registry of teaching ways: complete, truthful, and strict about names."""

from __future__ import annotations

import inspect
import json

import pytest
from torch import nn

import kdcore.teaching as package
from kdcore.teaching import teaching, teaching_entries, teaching_entry
from kdcore.trainer import TeachingStep

NAMES = {entry.name for entry in teaching_entries()}


def test_all_ways_are_there_once() -> None:
    assert len(NAMES) == len(teaching_entries())
    assert {
        *("several_teachers", "mutual_learning", "diverse_peers", "born_again", "assistant_chain"),
        *("residual_assistant", "deep_to_shallow", "class_wise", "data_distortion", "without_forgetting"),
        *("adversarially_robust", "defensive", "data_free_samples", "federated", "amalgamation", "codistillation"),
        *("quantisation_aware", "pruned_cross_distillation"),
    } <= NAMES


def test_every_public_step_is_registered_or_the_general_one() -> None:
    public = [getattr(package, name) for name in package.__all__]
    steps = {each for each in public if inspect.isclass(each) and issubclass(each, TeachingStep)}
    registered = {entry.target for entry in teaching_entries()}
    assert steps - registered <= {package.DistillationStep}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_an_entry_says_what_it_is(name: str) -> None:
    entry = teaching_entry(name)
    assert entry.name == name and entry.needs and entry.reference
    assert any(character.isdigit() for character in entry.reference), "a year"
    assert entry.form == (
        "step" if inspect.isclass(entry.target) and issubclass(entry.target, TeachingStep) else entry.form
    )
    assert entry.form in ("step", "fits", "function")
    assert entry.summary.endswith((".", ":")) and len(entry.summary) > 20
    assert entry.target.__name__ in package.__all__
    about = entry.describe()
    assert json.loads(json.dumps(about)) == about
    module, _, attribute = about["where"].rpartition(".")
    assert getattr(__import__(module, fromlist=[attribute]), attribute) is entry.target


def test_names_are_given_once_and_misspelt_ones_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"name: the teaching 'born_again' is registered already"):
        teaching("born_again", "step", "", "")(nn.Identity)
    with pytest.raises(ValueError, match=r"form: wanted one of step, fits, function, got 'loop'"):
        teaching("another", "loop", "", "")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"teaching: got the unknown name 'born_agian'; the nearest are born_again, "):
        teaching_entry("born_agian")
    assert {entry.name for entry in teaching_entries()} == NAMES
