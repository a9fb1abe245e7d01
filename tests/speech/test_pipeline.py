"""Whole runs, small: every recipe trains and its terms act; stages resume, and damaged runs say so."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.numpy import load_file, save_file

from apps.speech import fitting
from apps.speech.checks import check_config
from apps.speech.config import load_config, read_recipe, recipe_names
from apps.speech.data.folds import NO_FOLD
from apps.speech.distill import SpeechStep
from apps.speech.fitting import ask
from apps.speech.lessons import TeacherLessons
from apps.speech.measure import evaluate, shown_utterance
from apps.speech.measurement import Measurement
from apps.speech.models import new_model
from apps.speech.models.store import load_model
from apps.speech.pipeline import Pipeline, member_seed
from apps.speech.teachers import CrossFitted
from data_scripts.simulate_speech import simulate
from kdcore.config import UserError
from kdcore.locks import beside, locked
from kdcore.report import write_report
from kdcore.run import read_json, read_log
from tests.speech.hugging_face import pretrained
from tests.speech.small_runs import SIZES, TRAINER, run, small


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some seconds of simulated speech."""
    return simulate(tmp_path_factory.mktemp("speech") / "data", utterances=36)


def students(monkeypatch: pytest.MonkeyPatch) -> list[SpeechStep]:
    """Return the steps that a run will train its models by, as they come to be."""
    made: list[SpeechStep] = []

    class Kept(SpeechStep):
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options)
            made.append(self)

    monkeypatch.setattr(fitting, "SpeechStep", Kept)
    return made


def moving(step: SpeechStep, epoch: int, rows: Sequence[int] | None = None) -> set[str]:
    """Return the terms that move the student's weights in an epoch, each by itself; of ``rows`` alone if given."""
    if rows is not None:
        step.data = replace(step.data, rows=np.array(rows))
    generator = torch.Generator().manual_seed(0)
    step.begin_epoch(epoch, generator)
    values = step(next(iter(step.batches(epoch, generator))))
    weights = [each for each in step.student.parameters() if each.requires_grad]
    found = set()
    for name, value in values.items():
        if step.weights[name] and value.requires_grad:
            moves = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
            if any(each is not None and bool(each.abs().max() > 0) for each in moves):
                found.add(name)
    return found


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_runs_and_its_terms_act(
    recipe: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = students(monkeypatch)
    pipeline = small(recipe, data, tmp_path)
    rows = run(pipeline)
    assert [(row["role"], row["split"]) for row in rows] == [
        (role, part) for role in ("teacher", "student_alone", "student") for part in ("valid", "test")
    ]
    assert all(0 <= row["metrics"]["wer"] <= 3 and row["metrics"]["real_time_factor"] > 0 for row in rows)
    waits = {"delay", "first_symbol", "final"}
    heard = {name.partition("_ms_")[0] for name in rows[-1]["metrics"] if "_ms_" in name}
    assert heard <= waits
    low, high = rows[-1]["intervals"]["wer"]["utterance"]
    # there is none where every utterance has the same rate, as of a model that says nothing yet
    assert low is high is None or low <= rows[-1]["metrics"]["wer"] <= high
    events = [event for event in read_log(tmp_path / "run" / "log.jsonl") if event["event"] == "epoch"]
    taught = [event["terms"] for event in events if event["role"] == "student"]
    alone = [event["terms"] for event in events if event["role"] == "student_alone"]
    assert {name.split("_")[0] for name in taught[0]} == {"ctc", *pipeline.config.knowledge} and set(alone[0]) == {
        "ctc"
    }
    acting = {name: value for name, value in taught[0].items() if not name.startswith("layers_1")}  # these begin later
    assert all(np.isfinite(value) and value != 0 for value in acting.values())
    # each by itself moves the student's weights, those that begin later too
    assert moving(steps[-1], 0) | moving(steps[-1], 8) == set(taught[0])
    one, other = (load_file(tmp_path / "run" / role / "model.safetensors") for role in ("student", "student_alone"))
    assert any(not np.array_equal(one[name], other[name]) for name in one)
    model, units = load_model(tmp_path / "run" / "student")
    assert model.streaming and units.blank == pipeline.prepared.units.blank
    assert shown_utterance(pipeline).count("\n") >= 3
    assert read_json(tmp_path / "run" / "provenance.json")["simulated"] is True


def test_hints_are_taught_beside_other_terms(data: Path, tmp_path: Path) -> None:
    knowledge = {"hint": {"weight": 2.0, "options": {"delay": 2}}, "frame": {"options": {"delay": 2}}}
    pipeline = small("ctc_frame_level", data, tmp_path, knowledge=knowledge)
    pipeline.distill(0)
    pipeline.gather_log()
    events = [each for each in read_log(tmp_path / "run" / "log.jsonl") if each["event"] == "epoch"]
    terms = next(each["terms"] for each in events if each["role"] == "student")
    assert terms.keys() == {"ctc", "hint", "frame"} and all(np.isfinite(each) and each for each in terms.values())
    # the layer that fits the student's width to the teacher's is not part of the student
    model, _ = load_model(tmp_path / "run" / "seeds" / "0" / "student")
    assert (
        model.parameter_count() == load_model(tmp_path / "run" / "seeds" / "0" / "student_alone")[0].parameter_count()
    )


def test_all_that_a_teacher_knows_in_one_student(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = students(monkeypatch)
    ways = ("frame", "sequence", "segment", "guided", "hint")
    # lists of other sizes, so that those of an utterance are not taken for those of its segments
    options = {"sequence": {"options": {"count": 2}}, "segment": {"options": {"count": 3, "delay": 1}}}
    knowledge = {way: options.get(way, {}) for way in ways}
    pipeline = small("ctc_frame_level", data, tmp_path, knowledge=knowledge, views=[{}])
    pipeline.fit_student(0)
    assert moving(steps[-1], 0) == {"ctc", *ways}


def test_an_int8_student_is_stored_as_int8_weights_give_it(data: Path, tmp_path: Path) -> None:
    trainer = {**TRAINER, "max_epochs": 2}
    options = {"options": SIZES["conv_rnn"], "optimization": {"batch_frames": 1500}, "trainer": trainer}
    student = {"kind": "conv_rnn", "quantize": "int8", "quantize_from": 0.5, **options}
    pipeline = small("event_detection_int8", data, tmp_path, student=student)
    assert all(symbol.startswith("▁") and len(symbol) > 1 for symbol in pipeline.prepared.units.symbols)
    pipeline.distill(0)
    store = pipeline.prepared.store("valid", "clean")
    for role in ("student", "student_alone"):
        model, units = load_model(pipeline.run.path / "seeds" / "0" / role)
        state = model.state_dict()
        assert state.keys() == new_model("conv_rnn", units.blank + 1, SIZES["conv_rnn"]).state_dict().keys()
        heard = ask(model, [store[0]])["log_probs"][0]
        rounded = 0
        for name, value in state.items():
            if value.ndim > 1 and name.rpartition(".")[2].startswith("weight"):
                steps = value.flatten(1).abs().amax(1).clamp(min=1e-30).reshape(-1, *[1] * (value.ndim - 1)) / 127
                whole = (value / steps).round().to(torch.int8)
                torch.testing.assert_close(value / steps, whole.float(), atol=2e-3, rtol=0)
                state[name], rounded = whole.float() * steps, rounded + 1
        model.load_state_dict(state)
        np.testing.assert_allclose(ask(model, [store[0]])["log_probs"][0], heard, atol=1e-5)
        assert rounded == 8 and not np.allclose(heard, heard[0])
    with pytest.raises(UserError, match="share of the epochs"):
        small("event_detection_int8", data, tmp_path / "wrong", student={**student, "quantize_from": 2.0})


def test_recipes_say_what_they_are() -> None:
    for name in recipe_names():
        values = read_recipe(name)
        assert values["recipe"] == name and values["title"] and values["reference"]
        check_config(load_config(recipe=name, overrides=[("data.path", "x")]))


def test_a_teacher_that_never_hears_the_noise_is_validated_and_tested_without_it(data: Path, tmp_path: Path) -> None:
    views = [{"student": "noise:-20:-20", "teacher": "clean"}]
    pipeline, said = small("clean_to_noisy", data, tmp_path, views=views, test_view="noise:-20:-20"), list[str]()
    pipeline.announce = said.append
    teacher = pipeline.teach(0)
    assert any("view clean" in text for text in said) and not any("noise" in text for text in said)
    heard = Measurement(pipeline).hear(pipeline.cells(0)[0], "test").log_probs
    asked = teacher.ask(pipeline.prepared, "test", "clean", range(len(heard)))["log_probs"]
    noisy = teacher.ask(pipeline.prepared, "test", "noise:-20:-20", range(len(heard)))["log_probs"]
    for one, clean, other in zip(heard, asked, noisy, strict=True):
        np.testing.assert_allclose(one, clean, atol=1e-5)
        assert np.abs(one - other).max() > 1e-3
    pipeline.distill(0)
    rows = {row["role"]: row["model"] for row in evaluate(pipeline)}
    assert rows["teacher"].endswith(", clean") and "," not in rows["student"] + rows["student_alone"]
    write_report(pipeline.run.path)
    assert f"{rows['teacher']} (teacher)" in (pipeline.run.path / "report.html").read_text(encoding="utf-8")
    assert load_config(recipe="ctc_sequence_level", overrides=[("data.path", "x")]).tested_view("teacher") == "clean"
    noisy = [("data.path", "x"), ("views", '[{"student": "clean", "teacher": "noise:0:10"}]')]
    config = load_config(recipe="clean_to_noisy", overrides=noisy)
    assert config.tested_view("teacher") == config.tested_view("student") == "noise:0:10"


def test_stages_are_kept_and_another_configuration_is_refused(data: Path, tmp_path: Path) -> None:
    pipeline = small("ctc_sequence_level", data, tmp_path)
    first = run(pipeline)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("run/seeds/**/model.safetensors")}
    assert len(times) == 3
    again = run(Pipeline.reopen(tmp_path / "run"))
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert [row["metrics"]["wer"] for row in again] == [row["metrics"]["wer"] for row in first]
    with pytest.raises(UserError, match=r"holds a run with other settings \(seeds\)"):
        _ = small("ctc_sequence_level", data, tmp_path, seeds=[1]).prepared


def test_a_pretrained_teacher_from_a_folder(data: Path, tmp_path: Path) -> None:
    symbols = small("ctc_frame_level", data, tmp_path / "units").prepared.units.symbols
    folder = pretrained(tmp_path / "wav2vec2", symbols)
    teacher = {"path": str(folder)}
    pipeline = small("ctc_frame_level", data, tmp_path, teacher=teacher, views=[{}])
    rows = run(pipeline)
    assert [row["model"] for row in rows if row["role"] == "teacher"] == ["pretrained"] * 2
    weights = [load_file(file) for file in folder.glob("*.safetensors")]
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    sizes = {(row["params"], row["bytes"]) for row in rows if row["role"] == "teacher"}
    assert sizes == {(sum(each.size for part in weights for each in part.values()), stored)}
    terms = [event["terms"] for event in read_log(tmp_path / "run" / "log.jsonl") if event["role"] == "student"]
    assert terms[0]["frame"] > 0
    # it is measured by its own frames of 20 ms, in which double letters are told apart
    heard = Measurement(pipeline).hear(pipeline.cells(0)[0], "test")
    lengths = pipeline.prepared.store("test", "clean").lengths
    assert heard.frame_ms == 20 and [len(each) for each in heard.log_probs] == list(2 * -(-lengths // 4))
    # what it takes in memory is more than its weights, and it hears samples
    assert stored < Measurement(pipeline).memory()["teacher"]["peak_memory_bytes"] < 1 << 30
    # another weight in any of its files is another teacher
    before, shards = pipeline.teach(0).fingerprint, sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    tensors = load_file(shards[-1])
    save_file({name: value + 1 for name, value in tensors.items()}, shards[-1], metadata={"format": "pt"})
    changed = pipeline.teach(0).fingerprint
    assert changed != before
    # and so is another way of hearing, or another vocabulary
    (folder / "preprocessor_config.json").write_text('{"do_normalize": false}')
    unscaled = pipeline.teach(0).fingerprint
    vocabulary = read_json(folder / "vocab.json")
    (folder / "vocab.json").write_text(json.dumps({**vocabulary, "E": vocabulary["T"], "T": vocabulary["E"]}))
    assert len({before, changed, unscaled, pipeline.teach(0).fingerprint}) == 4
    with pytest.raises(UserError, match="an ensemble has no one encoder"):
        small("ctc_frame_level", data, tmp_path / "hint", teacher=teacher, knowledge={"hint": {}})


def test_a_folder_that_cannot_teach_is_refused_before_the_corpus_is_read(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "wav2vec2", "ab")
    copy = shutil.copytree(folder, tmp_path / "copy")
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "vocab.json").unlink()

    def refused(message: str, teacher: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=message) as error:
            small("ctc_frame_level", tmp_path, tmp_path / "refused", teacher=teacher)
        assert "\n" not in str(error.value)

    here, there = {"path": str(folder)}, {"path": str(copy)}
    refused(r"^teacher\.path: /nowhere: not a folder, wanted one with a Hugging Face model", {"path": "/nowhere"})
    refused(
        r"^teacher\.members\[1\]\.path: .*broken/vocab\.json: No such file", {"members": [{}, {"path": str(broken)}]}
    )
    refused(r"^teacher\.members\[2\]\.path: .* the same model as teacher\.members\[0\]", {"members": [here, {}, here]})
    refused(r"^teacher\.members\[1\]\.path: .*copy holds the same model", {"members": [here, there]})
    vocabulary = read_json(copy / "vocab.json")
    (copy / "vocab.json").write_text(json.dumps({**vocabulary, "A": vocabulary["B"], "B": vocabulary["A"]}))
    small("ctc_frame_level", tmp_path, tmp_path, teacher={"members": [here, there]})


def test_a_finished_run_needs_the_folder_of_its_teacher_no_more(data: Path, tmp_path: Path) -> None:
    symbols = small("ctc_frame_level", data, tmp_path / "units").prepared.units.symbols
    folder = pretrained(tmp_path / "wav2vec2", symbols)
    _ = small("ctc_frame_level", data, tmp_path, teacher={"path": str(folder)}).prepared
    shutil.rmtree(folder)
    assert Pipeline.reopen(tmp_path / "run").prepared.units.symbols == symbols
    shutil.rmtree(tmp_path / "run" / "data")
    with pytest.raises(UserError, match=r"^teacher\.path: .*not a folder"):
        Pipeline.reopen(tmp_path / "run")


def test_two_commands_fit_a_model_once(data: Path, tmp_path: Path) -> None:
    """The second one waits for the first, and takes what that made."""
    first, second = (small("ctc_frame_level", data, tmp_path / name, views=[{}]) for name in ("first", "second"))
    first.fit_alone(0)
    source, folder = (each.cells(0)[1].folder for each in (first, second))
    _ = second.prepared
    with ExitStack() as held:
        held.enter_context(locked(beside(folder)))
        said = list[str]()

        def announce(text: str) -> None:
            said.append(text)
            shutil.copytree(source, folder)
            held.close()

        second.announce = announce
        second.fit_alone(0)
    assert said == [f"{folder}: another command is making it; waiting"]
    assert source.with_name("student_alone.checkpoints").exists()
    assert not folder.with_name("student_alone.checkpoints").exists()


def test_two_commands_do_not_mix_their_settings(data: Path, tmp_path: Path) -> None:
    """The second one came when nothing was there, and finds a run of the first."""
    first, second = (small("ctc_frame_level", data, tmp_path, seeds=[seed]) for seed in (0, 1))
    with ExitStack() as held:
        held.enter_context(locked(beside(second.run.path / "data")))

        def announce(text: str) -> None:
            held.close()
            _ = first.prepared

        second.announce = announce
        with pytest.raises(UserError, match=r"run: holds a run with other settings \(seeds\)"):
            _ = second.prepared
    assert Pipeline.reopen(first.run.path).config.seeds == [0]


def fitted(folder: Path, member: int) -> dict[str, np.ndarray]:
    return load_file(folder / "run" / "seeds" / "shared" / "teacher" / f"member-{member}" / "model.safetensors")


@pytest.mark.parametrize("combine", ["average", "switched"])
def test_members_with_equal_settings_are_fitted_apart(
    combine: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = students(monkeypatch)
    member = {"kind": "bilstm", "options": SIZES["bilstm"], "trainer": TRAINER, "optimization": {"batch_frames": 1500}}
    alone = small("ctc_frame_level", data, tmp_path / "alone", teacher=member, views=[{}])
    teacher = {"members": [member, member], "combine": combine}
    pipeline = small("ctc_frame_level", data, tmp_path, teacher=teacher, views=[{}])
    rows = run(pipeline)
    assert [row["model"] for row in rows if row["role"] == "teacher"] == ["ensemble"] * 2
    one, other = fitted(tmp_path, 0), fitted(tmp_path, 1)
    assert any(not np.array_equal(one[name], other[name]) for name in one)
    both = pipeline.teach(0)
    assert Measurement(pipeline).memory().keys() == {"teacher", "student_alone", "student"}
    # the first is what it is by itself, and the second can be made again
    assert both.members[0].name == alone.teach(0).members[0].name
    for path in (tmp_path / "run" / "seeds" / "shared" / "teacher").glob("member-1*"):
        shutil.rmtree(path)
    assert pipeline.teach(0).fingerprint == both.fingerprint
    first, second, mean = (
        who.ask(pipeline.prepared, "test", "clean", [0])["log_probs"][0] for who in (both.alone(0), both.alone(1), both)
    )
    np.testing.assert_allclose(np.exp(mean), (np.exp(first) + np.exp(second)) / 2, atol=1e-5)
    terms = [event["terms"] for event in read_log(tmp_path / "run" / "log.jsonl") if event["role"] == "student"]
    assert terms[0]["frame"] > 0
    # what the student is told of an utterance: the average, or in each view what one of them says
    lessons = next(step.lessons for step in steps if step.lessons is not None)
    assert isinstance(lessons, TeacherLessons)
    prepared = pipeline.prepared
    told = [view.log_probs(0) for view in lessons.views]
    wanted = [both] if combine == "average" else [both.alone(0), both.alone(1)]
    for found, who in zip(told, wanted, strict=True):
        said = who.ask(prepared, prepared.training_parts, "clean", [0])["log_probs"][0]
        np.testing.assert_allclose(np.exp(found), np.exp(said), atol=2e-3)


def test_seeds_of_members_differ_by_place_and_seed() -> None:
    assert [member_seed(seed, 0) for seed in (0, 1, 5)] == [0, 1, 5]
    drawn = [member_seed(seed, place) for seed in range(20) for place in range(5)]
    assert len(set(drawn)) == len(drawn) and min(drawn) >= 0


def test_a_guided_member_is_taught_by_the_first(data: Path, tmp_path: Path) -> None:
    small("teacher_ensemble", data, tmp_path).teach(0)
    folder = tmp_path / "run" / "seeds" / "shared" / "teacher"
    first, second = (
        [event["terms"] for event in read_log(folder / f"member-{index}.checkpoints" / "log.jsonl") if "terms" in event]
        for index in (0, 1)
    )
    assert set(first[0]) == {"ctc"} and set(second[0]) == {"ctc", "guided"}
    assert np.isfinite(second[0]["guided"]) and second[0]["guided"] != 0


def of_folds(data: Path, folder: Path, **settings: Any) -> Pipeline:
    """Return a run whose teacher has others teach, each without the speakers of one of two folds."""
    teacher = {"kind": "bilstm", "options": SIZES["bilstm"], "trainer": TRAINER, "optimization": {"batch_frames": 1500}}
    return small("ctc_frame_level", data, folder, teacher={**teacher, "folds": 2, **settings}, views=[{}])


def _kind(folder: Path) -> str:
    return str(read_json(folder / "teacher" / "model.json")["label"])


def lecturer(pipeline: Pipeline) -> CrossFitted:
    found = pipeline.lecturer(0)
    assert isinstance(found, CrossFitted)
    return found


def test_teachers_of_folds_speak_of_what_they_were_not_trained_on(data: Path, tmp_path: Path) -> None:
    pipeline = of_folds(data, tmp_path / "one")
    who, prepared = lecturer(pipeline), pipeline.prepared
    speakers = [each.speaker for each in prepared.corpora["train"].utterances]
    assert set(who.folds) == {0, 1} and len(set(zip(speakers, who.folds, strict=True))) == len(set(speakers))
    rows = range(len(speakers))
    said = who.ask(prepared, "train", "clean", rows)["log_probs"]
    each = [other.ask(prepared, "train", "clean", rows)["log_probs"] for other in who.others]
    for row, fold in enumerate(who.folds.tolist()):
        np.testing.assert_allclose(said[row], each[fold][row], atol=1e-5)
        assert np.abs(said[row] - each[1 - fold][row]).max() > 1e-4
    with pytest.raises(ValueError, match="which the folds are of"):
        who.ask(prepared, "test", "clean", [0])
    # with other texts in the first fold, a teacher that was trained without it is the same, and the others are not
    other = of_folds(data, tmp_path / "other")
    file = other.prepared.folder / "data" / "train.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    first = [line for line, fold in zip(lines, who.folds, strict=True) if fold == 0]
    for line, text in zip(first, [each["text"] for each in first[1:] + first[:1]], strict=True):
        line["text"] = text
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    del other.prepared
    changed = lecturer(other)
    assert changed.others[0].fingerprint == who.others[0].fingerprint
    assert changed.others[1].fingerprint != who.others[1].fingerprint
    assert changed.members[0].name != who.members[0].name


def test_teachers_of_folds_are_guided_by_the_teacher_and_count_in_what_it_took(data: Path, tmp_path: Path) -> None:
    plain = of_folds(data, tmp_path / "plain", folds=0)
    pipeline = of_folds(data, tmp_path, guided=1.0)
    rows = run(pipeline)
    # the teacher itself is as it is without them
    assert plain.teach(0).fingerprint == pipeline.teach(0).fingerprint != lecturer(pipeline).fingerprint
    epochs = [event for event in read_log(tmp_path / "run" / "log.jsonl") if event["event"] == "epoch"]
    terms = {event["model"].partition(", ")[2]: set(event["terms"]) for event in epochs if event["role"] == "teacher"}
    guided = {f"without fold {fold} of 2": {"ctc", "guided"} for fold in (1, 2)}
    assert terms == {"": {"ctc"}, **guided}
    folder = tmp_path / "run" / "seeds" / "shared"
    spent = [read_json(file)["train_cpu_seconds"] for file in folder.glob("teacher*/**/model.json")]
    assert len(spent) == 3
    assert [row["train_cpu_seconds"] for row in rows if row["role"] == "teacher"] == [pytest.approx(sum(spent))] * 2
    assert {row["model"] for row in rows if row["role"] == "teacher"} == {f"{_kind(folder)}, teaching by 2 folds"}
    # what each said is kept by who said it: over one cache, a student of a teacher without folds is another one
    shutil.copytree(folder, tmp_path / "plain" / "run" / "seeds" / "shared", dirs_exist_ok=True)
    plain.fit_student(0)
    one, other = (load_file(path / "run/seeds/0/student/model.safetensors") for path in (tmp_path, tmp_path / "plain"))
    assert any(not np.array_equal(one[name], other[name]) for name in one)


def test_too_many_folds_are_refused_before_anything_is_fitted(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^teacher\.folds: got 500, the training part has \d+ speakers"):
        of_folds(data, tmp_path, folds=500).teach(0)
    assert not (tmp_path / "run" / "seeds").exists()
    pipeline, said = of_folds(data, tmp_path), list[str]()
    pipeline.announce = said.append
    assert pipeline.prepared
    assert re.fullmatch(r"teacher's folds: [\d.]+ min of \d+ speakers; [\d.]+ min of \d+ speakers", said[-1])


def test_what_nobody_wrote_down_is_spoken_of_by_the_teacher_itself(data: Path, tmp_path: Path) -> None:
    pipeline = of_folds(data, tmp_path)
    file = pipeline.prepared.folder / "data" / "train.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for line in lines[:3]:
        del line["text"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    del pipeline.prepared
    who, rows = lecturer(pipeline), range(len(lines))
    assert who.folds[:3].tolist() == [NO_FOLD] * 3 and min(who.folds[3:]) == 0
    said = who.ask(pipeline.prepared, ["train"], "clean", rows)["log_probs"]
    own = pipeline.teach(0).ask(pipeline.prepared, "train", "clean", rows)["log_probs"]
    for row in rows:
        assert np.allclose(said[row], own[row], atol=1e-5) is (row < 3)


def test_unlabelled_recordings_are_taught_by_the_teacher_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = students(monkeypatch)
    small("ctc_sequence_level", data, tmp_path)
    # recordings of nobody else's part
    other = simulate(tmp_path / "other", utterances=12, seed=7)
    config = load_config(
        file=tmp_path / "config.yaml", overrides=[("data.unlabelled", json.dumps(str(other / "train.jsonl")))]
    )
    pipeline = Pipeline(config, tmp_path / "run")
    pipeline.teach(0)
    pipeline.distill(0)
    rows = pipeline.prepared.training(["clean"])
    assert rows.labels[-1] is None and rows.labels[0] is not None
    # of recordings without a text alone, its hypotheses and posteriors move the student, and no label does
    unlabelled = [row for row, labels in enumerate(rows.labels) if labels is None]
    assert moving(steps[-1], 0, unlabelled) == {"sequence", "frame"}
    about = {
        role: read_json(tmp_path / "run" / "seeds" / "0" / role / "model.json") for role in ("student", "student_alone")
    }
    # the student alone hears its own texts again meanwhile: the comparison is of equal updates
    updates = about["student"]["updates"], about["student_alone"]["updates"]
    assert abs(updates[0] - updates[1]) <= max(1, 0.1 * updates[0])


def test_bad_recordings_are_named_or_counted(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    rows = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()]
    broken = tmp_path / "data" / rows[0]["audio_filepath"]
    broken.write_bytes(broken.read_bytes()[:2000])
    soundfile.write(tmp_path / "data" / rows[1]["audio_filepath"], np.zeros(800, np.float32), 16_000)
    rows[1] = {**rows[1], "text": "a text that is longer than its frames", "duration": 0.05}
    rows[2] = {**rows[2], "text": "..."}
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=rows[0]["id"]):
        _ = small("ctc_sequence_level", tmp_path / "data", tmp_path / "strict").prepared
    values = {"data": {"path": str(tmp_path / "data"), "skip_bad": True}}
    prepared = small("ctc_sequence_level", tmp_path / "data", tmp_path / "skipping", **values).prepared
    left_out = prepared.statistics()[0]["left out"]
    assert "1 bad audio" in left_out and "1 longer text than frames" in left_out and "1 no word" in left_out
    assert len(prepared.corpora["train"]) == len(rows) - 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"knowledge": {}}, "knowledge: wanted at least one"),
        ({"knowledge": {"sequnce": {}}}, "nearest|sequence"),
        ({"knowledge": {"frame": {"fade": -1}}}, r"knowledge\.frame\.fade: got -1, wanted epochs"),
        ({"views": [{"student": "speed:0.9", "teacher": "clean"}]}, "not of one length"),
        ({"views": [{"student": "tempo:1.2", "teacher": "tempo:1.3"}]}, "not of one length"),
        ({"views": []}, "at least one pair"),
        ({"seeds": [0, 0]}, "distinct seeds"),
        ({"seeds": [-1]}, "seeds of 0 or more"),
        ({"seeds": []}, "at least one"),
        ({"seeds": [10**20]}, r"^seeds: got \[10+\], wanted .* below 2\^63"),
        ({"teacher": {"seed": 2**63}}, r"^teacher\.seed: got \d+, wanted 0 or more, below 2\^63"),
        ({"test_view": None}, "'test_view': got nothing, wanted a value"),
        ({"views": [{"student": None}]}, r"'views\.0\.student': got nothing, wanted a value"),
        ({"student": {"kind": None}}, r"'student\.kind': got nothing, wanted a value"),
        ({"student": {"kind": "conv_rnn", "options": {"size": ["tiny"]}}}, r"conv_rnn has no size \['tiny'\]"),
        ({"units": {"kind": "sentencepiece", "size": 10**11}}, r"units\.size: got 10+, wanted 1 to 65536 pieces"),
        ({"report": {"metric": "wre"}}, r"report\.metric: got wre, wanted one of wer, cer"),
        ({"report": {"metrc": "wer"}}, r"unknown setting 'report\.metrc', did you mean metric"),
        (
            {"report": {"metric": "wer_lm"}, "decode": {"order": 0}},
            r"^report\.metric: got wer_lm, wanted decode\.order",
        ),
        ({"teacher": {"seed": -1}}, r"^teacher\.seed: got -1, wanted 0 or more"),
        ({"data": {"path": "x", "valid_speakers": 0}}, r"data\.valid_speakers: got 0, wanted 1 or more"),
        ({"data": {"path": "x", "split_seed": -1}}, r"data\.split_seed: got -1, wanted 0 or more"),
        ({"decode": {"order": 9}}, r"decode\.order: got 9, wanted 2 to 6, or 0"),
        ({"decode": {"order": 1}}, r"decode\.order: got 1, wanted 2 to 6, or 0"),
        ({"decode": {"beam": 0}}, r"decode\.beam: got 0, wanted 1 or more"),
        ({"decode": {"lm_weights": []}}, r"decode\.lm_weights: got \[\], wanted finite numbers, at least one"),
        ({"decode": {"word_scores": [float("inf")]}}, r"decode\.word_scores: got \[inf\], wanted finite numbers"),
        ({"knowledge": {"frame": {"weight": float("inf")}}}, r"^knowledge\.frame\.weight: got inf, wanted a finite"),
        ({"knowledge": {"frame": {"options": {"delay": -3}}}}, r"^knowledge\.frame\.options: delay: got -3, wanted 0"),
        ({"knowledge": {"sequence": {"options": {"beam": 2}}}}, r"^knowledge\.sequence\.options: beam: got 2, wanted"),
        ({"student": {"kind": "conv_rnn", "options": {"dropout": 3}}}, r"^student\.options: dropout: got 3.0, wanted"),
        ({"student": {"labels": float("inf")}}, r"^student\.labels: got inf, wanted a finite weight"),
        ({"teacher": {"options": {"dropout": 1}}}, r"^teacher\.options: dropout: got 1.0, wanted 0 to below 1"),
        ({"teacher": {"members": [{}, {"options": {"layers": 0}}]}}, r"^teacher\.members\[1\]\.options: layers: got 0"),
        ({"teacher": {"members": [{}, {}], "kind": "attention"}}, r"^teacher\.kind: got 'attention', wanted nothing"),
        ({"teacher": {"members": [{}, {}], "options": {"width": 8}}}, r"^teacher\.options: got .* teacher\.members"),
        ({"teacher": {"members": [{}], "path": "/nowhere"}}, r"^teacher\.path: got '/nowhere', wanted nothing beside"),
        ({"teacher": {"members": [{}, {}], "guided": 1.0}}, r"^teacher\.guided: got 1\.0, wanted nothing beside"),
        ({"teacher": {"members": [{}, {}], "quantize": "int8"}}, r"^teacher\.quantize: got 'int8', wanted nothing"),
        ({"teacher": {"members": [{}, {}], "trainer": {"max_epochs": 3}}}, r"^teacher\.trainer: got .* wanted nothing"),
        ({"teacher": {"members": [{}, {}], "augment": None}}, r"^teacher\.augment: got None, wanted nothing beside"),
        (
            {"teacher": {"members": [{}, {}], "combine": "switched", "by": "confidence"}},
            r"^teacher\.by: got confidence, wanted it with combine: average",
        ),
        ({"teacher": {"members": [{}], "combine": "switched"}}, r"^teacher\.combine: got switched, .* at least two"),
        ({"teacher": {"by": "confidence"}}, r"^teacher\.by: got confidence, wanted it with at least two"),
        (
            {"teacher": {"kind": "bilstm", "options": {"size": "tiny"}}},
            r"^teacher\.options\.size: .*bilstm has no sizes",
        ),
        ({"student": {"kind": "bilstm", "options": {}}}, "wanted a model that streams"),
        ({"student": {"kind": "conv_rnn", "options": {"size": "smal"}}}, "small"),
        ({"teacher": {"guided": 1.0}}, "a member after the first"),
        ({"teacher": {"folds": 1}}, r"^teacher\.folds: got 1, wanted at least 2"),
        ({"teacher": {"folds": -2}}, r"^teacher\.folds: got -2, wanted at least 2"),
        ({"teacher": {"folds": 2, "members": [{}, {}]}}, r"^teacher\.folds: wanted one teacher, trained here"),
        ({"teacher": {"folds": 2, "path": "/nowhere"}}, r"^teacher\.folds: wanted one teacher, trained here"),
        ({"teacher": {"folds": 2}, "knowledge": {"hint": {}}}, r"^teacher\.folds: hint and layers want one teacher"),
        ({"test_view": "nois:0:10"}, "noise"),
        ({"test_view": "tempo:1.3"}, r"^test_view: got tempo:1\.3, whose frames are not"),
        ({"views": [{"student": "noise:0:10+tempo:2", "teacher": "tempo:2"}]}, "before which both hear the same"),
        ({"student": {"trainer": {"monitor": "loss", "mode": "min"}}}, "wanted wer or cer"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_at_once(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        small("ctc_sequence_level", tmp_path, tmp_path, **change)
