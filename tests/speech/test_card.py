"""The model card says what the facts say, and no more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from apps.speech.card import Card, Difference, ModelFile, Rate, RunFacts, render, stated_licence, tail_seconds

FILES = (
    ModelFile("model.onnx", 3_400_000, 130, 130, 0.1049),
    ModelFile("model.int8.onnx", 890_000, 130, 127, 0.1062),
)
TEXTS = {each.name: "yes no" for each in FILES}
CARD = Card("an4-small", "conv_rnn", 829_668, "characters", 27, 160, 0, 2.4e-6, FILES, "recording an1-b", TEXTS)


def rate(role: str, decoding: str, value: float) -> Rate:
    return Rate(role, decoding, f"{role}-model", 829_668, value, value - 0.021, value + 0.019, 0.95, 130, 773)


RUN = RunFacts(
    data="an4",
    licence="BSD-style",
    simulated=(),
    all_simulated=False,
    parts=({"part": "test", "utterances": 130, "hours": 0.099, "speakers": 10, "words": 773, "audio": "good"},),
    recipe="ctc_sequence_level",
    title="Sequence-level distillation",
    reference="Takashima et al., ICASSP 2019",
    role="student",
    seed=1,
    knowledge=("sequence_level",),
    rates=tuple(
        rate(role, "wer", wer) for role, wer in (("teacher", 0.074), ("student_alone", 0.15), ("student", 0.11))
    ),
    differences=(Difference("student", "student_alone", "wer", -0.04, -0.055, -0.021, 0.95, 3, "speaker"),),
    delays={"p50": 120.0, "p90": 261.4},
)


def test_a_card_without_a_run_says_nothing_of_data_or_accuracy() -> None:
    text = render(CARD)
    assert text.startswith("# an4-small\n") and text.endswith("```\n")
    for wanted in ("conv_rnn, 829,668 parameters", "27 characters", "160 ms of audio a step", "| look-ahead | 0 ms |"):
        assert wanted in text
    for absent in ("## Data", "licence", "simulated", "teacher", "## Word error rate", "interval", "recipe"):
        assert absent not in text, absent
    assert "| `model.onnx` | 3,400,000 | 130 of 130 | 10.5 |" in text
    assert "| `model.int8.onnx` | 890,000 | 127 of 130 | 10.6 |" in text
    assert "by at most 2e-06 in log-probability" in text and "hear `yes no` in it" in text


def test_recordings_without_texts_have_no_error_rate() -> None:
    text = render(replace(CARD, models=tuple(replace(each, wer=None) for each in FILES)))
    assert "| `model.int8.onnx` | 890,000 | 127 of 130 |  |" in text


def test_accuracy_has_intervals_of_all_three() -> None:
    text = render(replace(CARD, run=RUN))
    assert "On the test part (130 utterances, 773 words)" in text and "95% interval" in text
    assert "| teacher | teacher-model | 829,668 | best path | 7.4 | 5.3 to 9.3 |" in text
    assert "| student alone | student\\_alone-model | 829,668 | best path | 15.0 | 12.9 to 16.9 |" in text
    assert "| **student** | student-model | 829,668 | best path | 11.0 | 8.9 to 12.9 |" in text
    assert "| student − student alone | best path | -4.0 | -5.5 to -2.1 | speakers | 3 |" in text
    assert "120 ms after its end (median; 90 % within 261 ms)" in text
    assert "taught by a teacher (sequence_level)" in text
    assert "Seed 1." in text and "After Takashima et al., ICASSP 2019." in text
    assert "Licence of the data: BSD-style" in text and "simulated" not in text


def test_the_student_alone_was_not_taught() -> None:
    text = render(replace(CARD, run=replace(RUN, role="student_alone", knowledge=())))
    assert "without a teacher" in text and "taught by a teacher" not in text and "| **student alone** |" in text


def test_what_is_not_known_is_not_said() -> None:
    bare = replace(RUN, licence=None, title="", reference="", rates=(), differences=(), delays={"p50": 1.0}, parts=())
    text = render(replace(CARD, run=bare))
    assert "The data states no licence." in text and "BSD" not in text
    for absent in ("## Word error rate", "After ", "median", "| part |"):
        assert absent not in text, absent


def test_one_run_without_an_interval() -> None:
    lonely = replace(RUN, rates=(replace(RUN.rates[2], low=None, high=None),), differences=())
    assert "| best path | 11.0 | none |" in render(replace(CARD, run=lonely))


def test_simulated_data_is_called_that() -> None:
    text = render(replace(CARD, run=replace(RUN, simulated=("sim",), all_simulated=True)))
    assert "**The recordings are simulated: a speech synthesiser spoke made-up sentences.**" in text
    assert "how well any of them hears people was not measured" in text
    text = render(replace(CARD, run=replace(RUN, simulated=("sim",))))
    assert "**Of these, sim is simulated" in text and "was not measured" not in text


def test_names_are_no_markup() -> None:
    text = render(
        replace(
            CARD,
            name="# <script>alert(1)</script> [x](y)",
            clip="a|b\n## c",
            clip_texts={"model.onnx": "a `b`", "model.int8.onnx": "a `b`"},
        )
    )
    assert "<script>" not in text.replace("\\<script\\>", "") and "\n## c" not in text
    assert "the models hear `` a `b` `` in it" in text
    text = render(replace(CARD, clip_texts={"model.onnx": "yes no", "model.int8.onnx": "yes"}))
    assert "; in it `model.onnx` hears `yes no`, `model.int8.onnx` hears `yes`." in text
    assert "; the model hears `yes` in it." in render(replace(CARD, clip_texts={"model.onnx": "yes"}))
    row = replace(RUN, rates=(replace(RUN.rates[0], model="x | y\nz"),))
    assert "| teacher | x \\| y z | " in render(replace(CARD, run=row))


def test_the_tail_covers_what_training_had_a_window_and_the_frames_behind_it() -> None:
    assert tail_seconds(160) == pytest.approx(0.43)
    text = render(replace(CARD, chunk_ms=640))
    assert "put 0.91 s of silence" in text and "int(0.91 * rate)" in text


def test_the_program_runs_a_model_that_is_there() -> None:
    assert 'model="model.int8.onnx"' in render(CARD)
    assert 'model="model.onnx"' in render(replace(CARD, models=FILES[:1]))


@pytest.mark.parametrize(
    ("name", "text", "licence"),
    [
        ("SOURCE.md", "# AN4\n- Licence: BSD-style, free; see LICENSE.\n", "BSD-style, free; see LICENSE."),
        ("SOURCE.md", "- Licence as stated in its README: CC BY-SA 4.0.\n- More\n", "CC BY-SA 4.0."),
        ("README.md", "---\nlicense: cc-by-4.0\n---\n", "cc-by-4.0"),
        ("README.md", "**License:** MIT\n", "MIT"),
        ("dataset.json", '{"license": "CC0-1.0"}', "CC0-1.0"),
        ("dataset.json", '{"license": 3}', None),
        ("dataset.json", "{of something else", None),
        ("README.md", "The licence is not known to us.\nLicence:\n\n", None),
        ("NOTES", "Licence: MIT\n", None),
    ],
)
def test_a_licence_is_read_where_it_is_stated(name: str, text: str, licence: str | None, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert stated_licence(tmp_path) == licence
