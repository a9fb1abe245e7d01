"""The report of a run: what it claims, what it refuses to claim, and that the file stands on its own."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from kdcore.config import UserError
from kdcore.report import compare, comparison_table, read_run, run_table, verdict, write_report
from kdcore.report.analysis import Comparison, metric_direction
from kdcore.report.figures import MAX_POINTS_OF_A_CURVE, near_and_far, thin_out
from kdcore.report.svg import Axis, nice_ticks, padded, tick_text
from kdcore.report.text import count, decimals_for, duration, metric_name, size
from kdcore.report.verdict import remarks
from kdcore.run import RunDirectory, metric_row, write_json
from tests.kdcore.fake_run import MODELS, rows, write_fake_run

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects tags with their attributes and the text, and checks that elements nest."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += " " + data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def run_with(folder: Path, found: list[dict[str, Any]], **files: Any) -> Path:
    RunDirectory.open(folder).write_metrics(found)
    for name, value in files.items():
        write_json(folder / f"{name}.json", value)
    return folder


def exact_rows(
    values: dict[tuple[str, str], list[float]], metric: str = "ndcg@10", **params: int
) -> list[dict[str, Any]]:
    """Return test rows of (role, model) with one value a seed; parameters by model name with "-" as "_"."""
    return [
        metric_row(
            domain="d", recipe="r", model=model, role=role, seed=seed, split="test", bytes=1000,
            params=params.get(model.replace("-", "_"), 100), metrics={metric: value},
        )
        for (role, model), scores in values.items()
        for seed, value in enumerate(scores)
    ]  # fmt: skip


def compared(found: list[dict[str, Any]], **options: Any) -> Comparison:
    comparison = compare(found, **options)
    assert comparison is not None
    return comparison


GOOD = {
    ("teacher", "big"): [0.50, 0.51, 0.49],
    ("student", "small"): [0.46, 0.47, 0.45],
    ("student_alone", "small"): [0.40, 0.41, 0.39],
    ("baseline", "simple"): [0.42, 0.425, 0.415],
}


def test_verdict_names_value_interval_reference_and_gap() -> None:
    comparison = compared(exact_rows(GOOD, big=5000))
    expected = stats.ttest_rel([0.46, 0.47, 0.45], [0.42, 0.425, 0.415]).confidence_interval()
    text = verdict(comparison)
    assert text.startswith("The student small (100 parameters) reaches 0.4600 NDCG@10: +0.0400 (95 % interval")
    assert f"{expected.low:+.4f} to {expected.high:+.4f}" in text
    assert "over the best baseline of its size (simple)" in text
    assert text.endswith("and closes 50 % of the gap to the teacher (big).")
    assert any(
        "+0.0600" in remark and "same student trained without a teacher" in remark for remark in remarks(comparison)
    )


@pytest.mark.parametrize(
    ("changes", "wanted", "refused"),
    [
        ({("student", "small"): [0.46, 0.40, 0.41]}, "the interval includes zero, so neither is shown", "closes"),
        ({("student", "small"): [0.38, 0.386, 0.374]}, "the student is worse", "closes"),
        ({("teacher", "big"): [0.41, 0.41, 0.41]}, "no gap to close", "closes"),
        ({("teacher", "big"): [0.50, 0.39, 0.40]}, "the data does not say", "closes"),
        ({("student", "small"): [0.56, 0.57, 0.55]}, "passing it", "worse"),
        ({("student_alone", "small"): [], ("baseline", "simple"): []}, "nothing shows what the teacher", "over the"),
        ({("student", "small"): []}, "There is no student", "over the"),
    ],
)
def test_verdict_claims_no_more_than_the_data(changes: dict[Any, Any], wanted: str, refused: str) -> None:
    text = verdict(compare(exact_rows(GOOD | changes, big=5000)))
    assert wanted in text
    assert refused not in text


def test_one_seed_gives_no_interval_and_no_share_of_the_gap() -> None:
    comparison = compared(exact_rows({key: values[:1] for key, values in GOOD.items()}, big=5000))
    text = verdict(comparison)
    assert "one seed: no interval; do not quote this difference" in text
    assert "closes" not in text


def test_one_seed_with_an_interval_over_users_is_not_to_be_quoted() -> None:
    found = exact_rows({key: values[:1] for key, values in GOOD.items()}, big=5000)
    given_pair = {
        "metric": "ndcg@10",
        "a": {"role": "student", "model": "small"},
        "b": {"role": "baseline", "model": "simple"},
        "difference": 0.04,
        "low": 0.03,
        "high": 0.05,
        "level": 0.95,
        "n_seeds": 1,
        "n_units": 6040,
        "method": "bootstrap",
    }
    text = verdict(compare(found, comparisons=[given_pair]))
    assert "[+0.0300, +0.0500] covers the test set, not the luck of training; do not quote" in text


def test_two_seeds_and_a_missing_control_are_remarked() -> None:
    two = {key: values[:2] for key, values in GOOD.items() if key[0] != "student_alone"}
    text = " ".join(remarks(compare(exact_rows(two, big=5000))))
    assert "2 seeds are few" in text
    assert "not trained alone" in text and "put down to the teacher" in text


def test_recorded_comparison_is_used_in_either_direction() -> None:
    pair = {"metric": "ndcg@10", "difference": 0.0411, "low": 0.0301, "high": 0.0522, "n_seeds": 3, "n_units": 9}
    student, other = {"role": "student", "model": "small"}, {"role": "baseline", "model": "simple"}
    found = exact_rows(GOOD, big=5000)
    forward = compared(found, comparisons=[pair | {"a": student, "b": other}]).differences["baseline", "simple"]
    minus = {"difference": -0.0411, "low": -0.0522, "high": -0.0301}
    backward = compared(found, comparisons=[pair | minus | {"a": other, "b": student}])
    assert (forward.estimate.value, forward.estimate.low, forward.estimate.high) == (0.0411, 0.0301, 0.0522)
    assert backward.differences["baseline", "simple"].estimate == forward.estimate


def test_recorded_gap_closed_is_used() -> None:
    pair = {
        "metric": "ndcg@10",
        "a": {"role": "student", "model": "small"},
        "b": {"role": "baseline", "model": "simple"},
        "difference": 0.04,
        "low": 0.03,
        "high": 0.05,
        "n_seeds": 3,
        "gap_closed": {"value": 0.48, "low": 0.41, "high": 0.55},
    }
    gap = compared(exact_rows(GOOD, big=5000), comparisons=[pair]).gap
    assert gap is not None and (gap.value, gap.low, gap.high) == (0.48, 0.41, 0.55)


def test_lower_is_better_for_error_rates_and_by_choice() -> None:
    errors = {key: [1 - value for value in values] for key, values in GOOD.items()}
    comparison = compared(exact_rows(errors, "wer", big=5000))
    assert not comparison.higher_is_better
    assert comparison.reference is not None and comparison.reference.label == "simple"
    text = verdict(comparison)
    assert "WER (lower is better): −0.0400" in text and "closes 50 %" in text
    turned = compared(exact_rows(GOOD, "own", big=5000), higher_is_better={"own": False})
    assert "the student is worse" in verdict(turned)
    assert metric_direction("wer", True) and not metric_direction("log-loss") and metric_direction("ndcg@10")


def test_models_are_grouped_by_teacher_and_size() -> None:
    values = GOOD | {
        ("baseline", "large"): [0.48, 0.48, 0.48],
        ("baseline", "heavy"): [0.1],
        ("assistant", "mid"): [0.47],
    }
    found = exact_rows(values, big=5000, large=1000, mid=1000)
    for row in found:
        if row["model"] == "heavy":  # no parameters: judged by bytes
            row.update(params=0, bytes=10**6)
    comparison = compared(found)
    assert comparison.groups["baseline", "large"] == comparison.groups["baseline", "heavy"] == "larger"
    assert comparison.groups["baseline", "simple"] == comparison.groups["student_alone", "small"] == "same_size"
    assert comparison.reference is not None and comparison.reference.label == "simple"
    order = [comparison.groups[entry.key] for entry in comparison.entries]
    assert order == sorted(order, key=["teacher", "assistant", "student", "same_size", "larger"].index)


def test_best_of_several_students_is_selected_on_validation() -> None:
    models = [*MODELS, ("mf-9", "student", 23_000, 3, 0.4170)]
    found = rows(models)
    for row in found:
        if row["model"] == "mf-9" and row["split"] == "valid":
            row["metrics"]["ndcg@10"] = 0.1
    comparison = compared(found)
    assert comparison.student is not None and comparison.student.label == "mf-8"
    assert "The student is the best of 2, selected on valid." in remarks(comparison)
    without = compared([row for row in found if row["split"] == "test"])
    assert without.student is not None and without.student.label == "mf-9"
    assert "optimistic" in " ".join(remarks(without))


def test_unequal_seeds_are_paired_where_they_can_be() -> None:
    values = GOOD | {("baseline", "once"): [0.41], ("student_alone", "small"): [0.40]}
    comparison = compared(exact_rows(values, big=5000))
    once = comparison.differences["baseline", "once"].estimate
    expected = stats.ttest_1samp([0.46, 0.47, 0.45], 0.41).confidence_interval()
    assert once.low == pytest.approx(expected.low - 0.41) and "run once" in once.method
    alone = comparison.differences["student_alone", "small"]
    assert alone.estimate.low is None and not alone.quotable  # a control of one seed is no control of training luck


def test_terminal_table_fits_in_100_columns_and_shows_names_as_they_are() -> None:
    found = exact_rows(
        GOOD | {("baseline", "[red]a-very-long-name-that-goes-on-and-on-and-on"): [0.3]}, big=123_456_789
    )
    output = io.StringIO()
    console = Console(file=output, width=100)
    table = comparison_table(found)
    console.print(table)
    text = output.getvalue()
    assert console.measure(table).minimum <= 100
    assert max(map(len, text.splitlines())) <= 100
    assert "[red]a-very" in text and "123 M" in text
    assert "+0.0400" in text and "0.4600 ± 0.0100" in text and "closes 50 %" in text


def test_terminal_table_of_no_rows_says_so() -> None:
    output = io.StringIO()
    Console(file=output, width=100).print(comparison_table([]))
    assert "no results in this run yet" in output.getvalue()


def test_html_and_terminal_say_the_same(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run")
    output = io.StringIO()
    Console(file=output, width=100).print(run_table(read_run(folder)))
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    sentence = verdict(compare(rows()))
    assert sentence in page.text
    assert " ".join(sentence.split()) in " ".join(output.getvalue().split())


def with_own_intervals(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows that have intervals, memory and notes, as those of a run that measured them."""
    for row in found:
        value, seed = row["metrics"]["ndcg@10"], row["seed"]
        own = {"user": [value - 0.02 * (seed + 1), value + 0.02 * (seed + 1)], "group": [None, None]}
        row |= {"intervals": {"ndcg@10": own}, "peak_memory_bytes": 12_300_000}
        row["notes"] = {"rtf": "in <whole>" if row["role"] == "teacher" else "in chunks"}
    return found


def test_a_models_own_interval_and_its_memory_are_shown(tmp_path: Path) -> None:
    found = with_own_intervals(exact_rows(GOOD, big=123_456_789))
    entry = next(each for each in compared(found).entries if each.role == "student")
    assert entry.intervals["ndcg@10"]["user"] == pytest.approx((0.42, 0.50)) and entry.memory == 12_300_000
    output = io.StringIO()
    console = Console(file=output, width=100)
    table = comparison_table(found)
    console.print(table)
    text = output.getvalue()
    assert console.measure(table).minimum <= 100 and max(map(len, text.splitlines())) <= 100
    for part in ("95 % by user", "95 % by group", "[0.4200, 0.5000]", "no interval", "Memory", "12.3 MB"):
        assert part in text, part
    page = Page(write_report(run_with(tmp_path / "run", found)).read_text(encoding="utf-8"))
    for part in (
        "by user [0.4200, 0.5000]",
        "by group no interval",
        "Memory, peak",
        "12.3 MB",
        "of several seeds, the mean bounds",
        "rtf: in <whole> (teacher big); in chunks (student small, baseline simple, student alone small).",
        "not by whether these intervals overlap",
    ):
        assert part in page.text, part


def test_a_run_without_own_intervals_says_nothing_of_them(tmp_path: Path) -> None:
    text = Page(write_report(write_fake_run(tmp_path / "run")).read_text(encoding="utf-8")).text
    for part in ("Memory", "the model's own", "overlap", "mean bounds"):
        assert part not in text, part


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("intervals", [1]),
        ("intervals", {"ndcg@10": [0.1, 0.2]}),
        ("intervals", {"ndcg@10": {"user": [0.1]}}),
        ("intervals", {"ndcg@10": {"user": "ab"}}),
        ("notes", {"ndcg@10": 3}),
        ("notes", "text"),
    ],
)
def test_damaged_intervals_and_notes_are_named(field: str, value: Any, tmp_path: Path) -> None:
    found = exact_rows(GOOD, big=5000)
    found[1][field] = value
    with pytest.raises(UserError, match=rf"metrics\.json: row 2: {field}"):
        write_report(run_with(tmp_path / "run", found))


def test_report_stands_alone_and_is_the_same_twice(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run")
    first = write_report(folder).read_bytes()
    page = Page(first.decode())
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "object", "embed", "base", "form"}
    links = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert links == ["data:,"]
    assert b"http:" not in first and b"https:" not in first and b"url(" not in first and b"@import" not in first
    policies = [meta["content"] for meta in page.named("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    assert write_report(folder).read_bytes() == first


def test_report_shows_every_part(tmp_path: Path) -> None:
    page = Page(write_report(write_fake_run(tmp_path / "run")).read_text(encoding="utf-8"))
    for part in (
        "Simulated data.",
        "kd recsys run --recipe ranking-distillation --out 'runs/a run'",
        "NDCG@10: mf-8 minus each model",
        "NDCG@10 against size on disk",
        "NDCG@10 in validation",
        "Loss: ranking",
        "NDCG@10 by user activity",
        "NDCG@10 by item popularity",
        "Baselines of the student's size or smaller",
        "top_n: 10",
        "versions.torch",
        "recall@10",
    ):
        assert part in page.text, part


def test_report_is_accessible(tmp_path: Path) -> None:
    text = write_report(write_fake_run(tmp_path / "run")).read_text(encoding="utf-8")
    page = Page(text)
    assert page.named("html") == [{"lang": "en"}]
    plots = [attributes for attributes in page.named("svg") if attributes["class"] == "plot"]
    assert len(plots) == 8
    assert all(plot["role"] == "img" and plot["aria-label"] for plot in plots)
    assert all(attributes["aria-hidden"] == "true" for attributes in page.named("svg") if attributes not in plots)
    assert all(attributes.get("scope") in ("col", "row", "rowgroup") for attributes in page.named("th"))
    assert len(page.named("caption")) == len(page.named("table")) > 3
    assert "prefers-color-scheme:dark" in text and any(m.get("name") == "viewport" for m in page.named("meta"))


def test_plots_are_well_formed_and_inside_their_box(tmp_path: Path) -> None:
    text = write_report(write_fake_run(tmp_path / "run")).read_text(encoding="utf-8")
    pieces = text.split('<svg class="plot"')[1:]
    assert pieces
    for piece in pieces:
        root = ElementTree.fromstring('<svg class="plot"' + piece.split("</svg>")[0] + "</svg>")
        width, height = (float(part) for part in root.attrib["viewBox"].split()[2:])
        for element in root.iter():
            for name, limit in (("x", width), ("cx", width), ("x2", width), ("y", height), ("cy", height)):
                assert 0 <= float(element.attrib.get(name, 0)) <= limit
            for pair in element.attrib.get("points", "").split():
                x, y = map(float, pair.split(","))
                assert 0 <= x <= width and 0 <= y <= height


def test_everything_from_data_is_escaped(tmp_path: Path) -> None:
    evil = "</title></style><script>alert(1)</script>\" onload='x' & <b>"
    folder = tmp_path / "<img src=x onerror=alert(2)>"
    found = exact_rows({(role, evil): values for (role, _), values in GOOD.items()}, metric=evil)
    for row in found:
        row.update(domain=evil, recipe=evil, latency_ms={"p50": 1.0, "p99": 2.0})
    sides = {"a": {"role": "student", "model": evil}, "b": {"role": evil, "model": evil}}
    comparison = {"metric": evil, "difference": 0.1, "low": 0.0, "high": 0.2, "n_seeds": 2, "method": evil} | sides
    item = {"axis": evil, "slice": evil, "n": 3, "role": evil, "model": evil, "seed": 0, "value": 0.5}
    provenance = {"command": [evil], evil: evil, "commit": evil, "started": evil}
    slices = {"metric": evil, "slices": [item]}
    run_with(folder, found, comparisons=[comparison], slices=slices, provenance=provenance)
    RunDirectory.open(folder).write_config({evil: evil})
    examples = {"title": evil, "blocks": [{"title": evil, "text": evil}]}
    (folder / "examples.json").write_text(json.dumps(examples), encoding="utf-8")
    event = {"event": "epoch", "role": evil, "model": evil, "seed": evil, "epoch": 1}
    log = json.dumps(event | {"terms": {evil: 1.0}, "validation": {evil: 0.5}})
    (folder / "log.jsonl").write_text(log + "\n", encoding="utf-8")
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert not {tag for tag, _ in page.tags} & {"script", "img", "b"}
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert page.text.count("<script>alert(1)</script>") > 10


def test_missing_pieces_are_absent_with_a_word(tmp_path: Path) -> None:
    page = Page(write_report(run_with(tmp_path, exact_rows(GOOD))).read_text(encoding="utf-8"))
    for word in ("No training log", "No slices were measured", "command was not recorded", "No configuration"):
        assert word in page.text
    assert "Simulated" not in page.text


def test_examples_are_shown_as_they_are(tmp_path: Path) -> None:
    folder = run_with(tmp_path, exact_rows(GOOD))
    assert "<pre" not in write_report(folder).read_text(encoding="utf-8").split("What was run")[0]
    blocks = [{"title": "an251: 1 of 2 words", "text": "REF: yes no\nHYP: yes **\n         D"}]
    (folder / "examples.json").write_text(json.dumps({"title": "Worst", "blocks": blocks}), encoding="utf-8")
    text = write_report(folder).read_text(encoding="utf-8")
    assert "<h2>Worst</h2>" in text and "<pre>REF: yes no\nHYP: yes **\n         D</pre>" in text


def test_a_run_in_progress_has_curves_and_no_results(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run", epochs=3)
    (folder / "metrics.json").unlink()
    (folder / "slices.json").unlink()
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "There are no results in this run yet." in page.text and "NDCG@10 in validation" in page.text


def test_long_logs_and_broken_values_stay_small_and_are_left_out(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run", epochs=2500)
    event = {"event": "epoch", "role": "student", "model": "mf-8", "seed": 0, "epoch": 2501}
    odd = json.dumps(event | {"terms": {"bpr": float("nan"), "text": "x"}, "validation": None})
    with open(folder / "log.jsonl", "a", encoding="utf-8") as handle:
        handle.write(odd + '\n[1, 2]\n{"event": "epoch"}\n{"event": "torn')
    text = write_report(folder).read_text(encoding="utf-8")
    assert len(text) < 300_000
    assert not re.search(r"\bnan\b", text, re.IGNORECASE) and "Loss: text" not in text
    longest = max(len(piece.split('"')[0].split()) for piece in text.split(' points="')[1:])
    assert longest <= MAX_POINTS_OF_A_CURVE


def test_a_model_far_off_is_named_and_not_drawn() -> None:
    near, far = near_and_far(compared(rows()))
    assert [entry.label for entry in far] == ["popularity"]
    assert len(near) == len(MODELS) - 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.json", '[{"role": "student"}]', "row 1: 'model' is missing"),
        ("metrics.json", "[1,\n2,]", "line 2"),
        ("metrics.json", "{}", "wanted list"),
        ("slices.json", '{"metric": "x", "slices": [{}]}', "slice 1: 'axis' is missing"),
        ("examples.json", '{"title": "x", "blocks": [{"text": "y"}]}', "block 1: 'title' is missing"),
        ("comparisons.json", '[{"metric": "x", "a": {}, "b": {}, "difference": 0}]', "entry 1, a: 'role' is missing"),
        ("config.yaml", "a: [", "not YAML"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    folder = write_fake_run(tmp_path / "run", epochs=2)
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        write_report(folder)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not (folder / "report.html").exists()


def test_user_errors_say_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run"):
        write_report(tmp_path / "missing")
    with pytest.raises(UserError, match="nothing to report"):
        write_report(tmp_path)
    found = exact_rows(GOOD)
    with pytest.raises(UserError, match="metric: got 'x', the run has ndcg@10"):
        compare(found, metric="x")
    with pytest.raises(UserError, match="split: got 'dev', the run has test"):
        compare(found, split="dev")
    with pytest.raises(UserError, match="stands twice"):
        compare([*found, found[0]])
    with pytest.raises(UserError, match="role 'pupil'"):
        compare([found[0] | {"role": "pupil"}])


def test_options_come_from_the_configuration(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run", epochs=2)
    RunDirectory.open(folder).write_config({"report": {"metric": "mrr", "split": "valid", "higher_is_better": False}})
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "MRR on the valid split; lower is better." in page.text
    page = Page(write_report(folder, metric="recall@10", higher_is_better=True).read_text(encoding="utf-8"))
    assert "recall@10 on the valid split; higher is better." in page.text


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_and_inside(low: float, width: float) -> None:
    high = low + width
    if not high > low:
        return
    ticks = nice_ticks(*padded([low, high]))
    bounds = padded([low, high])
    assert 2 <= len(ticks) <= 11
    assert all(bounds[0] - 1e-6 * width <= tick <= bounds[1] + 1e-6 * width for tick in ticks)
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_scales_and_labels() -> None:
    assert Axis(1, 100, 0, 200, log=True)(10) == pytest.approx(100)
    assert tick_text([0.38, 0.4, 0.42]) == ["0.38", "0.40", "0.42"]
    assert tick_text([-5.0, 0.0, 5.0]) == ["−5", "0", "5"]
    assert Axis(0, 4e6, 0, 1).ticks[-1] == 4e6


def test_points_are_thinned_evenly_with_both_ends() -> None:
    points = [(float(index), 0.0) for index in range(1000)]
    kept = thin_out(points, 50)
    assert len(kept) == 50 and kept[0] == points[0] and kept[-1] == points[-1]
    assert thin_out(points[:50], 50) == points[:50]


def test_numbers_for_people() -> None:
    assert [count(x) for x in (0, 999, 22_682, 999_999, 1_234_567, 2.5e9)] == [
        "–",
        "999",
        "22,682",
        "999,999",
        "1.23 M",
        "2.5 G",
    ]
    assert [size(x) for x in (12, 91_900, 10_160_000)] == ["12 B", "91.9 kB", "10.2 MB"]
    assert [duration(x) for x in (0, 0.31, 12.4, 200, 7500)] == ["–", "0.31 s", "12 s", "3 min 20 s", "2 h 05 min"]
    assert [decimals_for([x]) for x in (0.4, 9.9, 12.0, 123.0, 0.0005)] == [4, 4, 2, 1, 7]
    assert metric_name("ndcg@10") == "NDCG@10" and metric_name("hit_rate@5") == "hit rate@5"
