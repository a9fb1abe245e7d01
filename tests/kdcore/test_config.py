"""Configurations are data: typed, checked by name, read back as written, and nothing in them runs."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcore.config import UserError, apply_overrides, build, dump_yaml, nearest, parse_value, read_yaml, resolved


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    steps: int = 5
    mode: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}, wanted at least 1")


@dataclass(frozen=True)
class Outer:
    name: str = ""
    inner: Inner = field(default_factory=Inner)
    many: list[Inner] = field(default_factory=list)
    named: dict[str, Inner] = field(default_factory=dict)
    free: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    limit: float | None = None


def test_builds_nested_dataclasses() -> None:
    values = {
        "name": "n",
        "inner": {"rate": 1, "mode": "b"},
        "many": [{"steps": 2}, {}],
        "named": {"x": {"rate": 2.5}, "y": {}},
        "free": {"a": [1, {"b": None}], "c": "text"},
        "seeds": [3, 1],
        "limit": 4.0,
    }
    built = build(Outer, values)
    wanted = Outer(
        "n",
        Inner(1.0, mode="b"),
        [Inner(steps=2), Inner()],
        {"x": Inner(2.5), "y": Inner()},
        values["free"],
        [3, 1],
        4.0,
    )
    assert built == wanted
    assert build(Outer, resolved(built)) == built
    assert build(Outer, {}) == Outer()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nam": "x"}, "unknown setting 'nam', did you mean name"),
        ({"inner": {"stepz": 1}}, "unknown setting 'inner.stepz', did you mean steps"),
        ({"many": [{}, {"stepz": 1}]}, r"unknown setting 'many.1.stepz'"),
        ({"named": {"x": {"stepz": 1}}}, r"unknown setting 'named.x.stepz'"),
        ({"inner": {"steps": "many"}}, "inner.steps"),
        ({"inner": {"steps": 1.5}}, "inner.steps"),
        ({"inner": {"steps": True}}, "inner.steps"),
        ({"inner": {"mode": "c"}}, "inner.mode"),
        ({"inner": {"steps": 0}}, "steps: got 0, wanted at least 1"),
        ({"inner": 3}, "'inner': wanted settings"),
        ({"inner": None}, "'inner': wanted settings"),
        ({"many": {"steps": 1}}, "'many': wanted a list"),
        ({"named": [1]}, "'named': wanted settings"),
        ({"free": "x"}, "'free': wanted settings"),
        ({"seeds": ["one"]}, "seeds"),
    ],
)
def test_mistakes_are_one_line_naming_source_and_setting(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(Outer, values, "my.yaml")
    assert str(caught.value).startswith("my.yaml: ")
    assert "\n" not in str(caught.value)


EVIL = {"class_path": "evil_module.X", "init_args": {}}


@pytest.mark.parametrize(
    "values",
    [
        EVIL,
        {"inner": EVIL},
        {"inner": "evil_module.X"},
        {"inner": str(EVIL)},
        {"many": [EVIL]},
        {"many": ["evil_module.X"]},
        {"many": str([EVIL])},
        {"named": {"x": EVIL}},
        {"named": {"x": "evil_module.X"}},
        {"free": EVIL},
        {"free": {"a": EVIL}},
        {"free": {"a": [{"b": EVIL}]}},
        {"free": {"a": str(EVIL)}},
        {"free": str({"a": EVIL})},
        {"limit": EVIL},
        {"name": EVIL},
    ],
)
def test_no_configuration_names_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]) -> None:
    """jsonargparse imports what a class_path names, wherever a dataclass or anything at all may stand."""
    (tmp_path / "evil_module.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError):
        build(Outer, values)
    assert "evil_module" not in sys.modules


def test_no_setting_reads_another_file(tmp_path: Path) -> None:
    (tmp_path / "inner.yaml").write_text("rate: 9\n")
    for values in ({"inner": str(tmp_path / "inner.yaml")}, {"many": [str(tmp_path / "inner.yaml")]}):
        with pytest.raises(UserError):
            build(Outer, values)
    assert build(Outer, {"free": {"a": str(tmp_path / "inner.yaml")}}).free["a"] == str(tmp_path / "inner.yaml")


@pytest.mark.parametrize("text", ["a: !!python/object/apply:os.getcwd []", "a: !!python/name:os.system"])
def test_yaml_tags_name_no_code_either(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml, line 1, column 4"):
        read_yaml(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1.5", 1.5),
        (".5", 0.5),
        ("-2", -2),
        ("010", 10),
        ("true", True),
        ("null", None),
        ("", None),
        ("[1, a]", [1, "a"]),
        ("{a: 1}", {"a": 1}),
        ("'5'", "5"),
        # by YAML 1.1 these would be False, 750, a date, 1000, 31 and infinity
        ("no", "no"),
        ("12:30", "12:30"),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("0x1F", "0x1F"),
        ("inf", "inf"),
        # no YAML at all
        ("[1, ", "[1, "),
        ("a: b: c", "a: b: c"),
    ],
)
def test_command_line_texts(text: str, value: Any) -> None:
    parsed = parse_value(text)
    assert (parsed, type(parsed)) == (value, type(value))


# NEL is a line break to YAML, and PyYAML writes it as one
words = st.text(st.characters(exclude_characters="\x85", exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    ["no", "1e5", "1_0", "null", "~", "0x1", "12:30", ".inf", "true", "=", "<<", "-"]
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
)


@settings(max_examples=60)
@given(st.dictionaries(words, plain, max_size=3))
def test_what_is_written_reads_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any]) -> None:
    file = tmp_path_factory.getbasetemp() / "roundtrip.yaml"
    file.write_text(dump_yaml(value), encoding="utf-8")
    assert repr(read_yaml(file)) == repr(value)


# ten times the list before, seven times
BILLION = "".join(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in pairwise("abcdefgh"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [", "line 2"),
        ("a: 1\nb: 2\na: 3\n", r"line 3, column 1: 'a' stands here twice"),
        ("- a\n", "wanted a mapping of settings, got list"),
        ("", "wanted a mapping of settings, got NoneType"),
        ("a: \x00", "c.yaml"),
        ("a: &a [*a]\n", "refers to itself"),
        ("a: &a {b: *a}\n", "refers to itself"),
        ("a: &a [x, x, x, x, x, x, x, x, x, x]\n" + BILLION, "holds more than 100,000 values"),
        ("a: " + "[" * 5000, "nested too deeply"),
    ],
)
def test_unreadable_files_say_where(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_yaml(tmp_path / "c.yaml")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: No such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="directory"):
        read_yaml(tmp_path)
    (tmp_path / "c.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(UserError, match="not UTF-8"):
        read_yaml(tmp_path / "c.yaml")


def test_overrides_reach_into_and_make_sections_without_touching_the_original() -> None:
    values = {"a": {"b": 1, "c": [1]}, "d": "text"}
    changed = apply_overrides(values, [("a.b", "2"), ("new.deep.one", "1e-3"), ("d.e", "5"), ("a.c", "[2]")])
    assert changed == {"a": {"b": 2, "c": [2]}, "d": {"e": 5}, "new": {"deep": {"one": 1e-3}}}
    assert values == {"a": {"b": 1, "c": [1]}, "d": "text"}


def test_overrides_reach_into_lists() -> None:
    values = {"a": [{"b": 1}, {"c": {"d": 2}}, 3]}
    changed = apply_overrides(values, [("a.0.b", "5"), ("a.1.c.e", "6"), ("a.2", "text"), ("a.1.f.g", "7")])
    assert changed == {"a": [{"b": 5}, {"c": {"d": 2, "e": 6}, "f": {"g": 7}}, "text"]}
    for path in ("a.3", "a.-1.b", "a.x.b", f"a.{'9' * 5000}"):
        with pytest.raises(UserError, match=r"wanted a place of the list, 0 to 2"):
            apply_overrides(values, [(path, "1")])


def test_nearest_names() -> None:
    assert nearest("studnt", ["student", "teacher"]) == "did you mean student?"
    assert nearest("zzz", ["b", "a"]) == "wanted one of a, b"


def test_resolved_is_plain() -> None:
    plain = resolved(Outer(many=[Inner()]))
    assert plain == dataclasses.asdict(Outer(many=[Inner()]))
    assert yaml.safe_load(dump_yaml(plain)) == plain


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inner": {"steps": "few"}}, "c: inner.steps: got few, wanted a whole number"),
        ({"inner": {"mode": "c"}}, "c: inner.mode: got c, wanted one of a, b"),
        ({"limit": [1]}, "c: limit: got [1], wanted a number or null"),
        ({"many": [{}, {"steps": "few"}]}, "c: many, steps: got few, wanted a whole number"),
        ({"seeds": ["x"]}, "c: seeds: got x, wanted a whole number"),
        # whose value it is
        ({"inner": {"steps": 0}}, "c: inner: steps: got 0, wanted at least 1"),
        ({"many": [{}, {"steps": 0}]}, "c: many.1: steps: got 0, wanted at least 1"),
        ({"named": {"x": {}, "y": {"steps": 0}}}, "c: named.y: steps: got 0, wanted at least 1"),
    ],
)
def test_errors_name_the_setting_and_what_is_wanted(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        build(Outer, values, "c")
    assert str(error.value) == message
