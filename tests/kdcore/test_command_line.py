"""What a command says and returns when something is wrong: one line, and the right exit code."""

from __future__ import annotations

import argparse
import errno

import pytest

from kdcore.command_line import Parser, example, guarded, integers, split_overrides
from kdcore.config import UserError


def run(error: BaseException | None, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    def command() -> int:
        if error is not None:
            raise error
        return 0

    return guarded(command), capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (None, 0, ""),
        (UserError("a.csv: line 3:\n  bad"), 2, "kd: error: a.csv: line 3: bad\n"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x/y"), 2, "x/y: No such file"),
        (PermissionError(errno.EACCES, "Permission denied", "x/y"), 2, "x/y: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device", "x/y"), 1, "failed: x/y: No space left on device"),
        (OSError("model: cannot be written"), 1, "failed: model: cannot be written"),
        (FloatingPointError("loss term 'bpr' became nan"), 1, "failed: loss term 'bpr' became nan"),
        (
            ModuleNotFoundError("no", name="implicit.als"),
            1,
            "this needs the package implicit: pip install 'kdsuite[recsys]'",
        ),
        (ModuleNotFoundError("no", name="kaldi_native_fbank"), 1, "pip install 'kdsuite[ondevice]'"),
        (ModuleNotFoundError("no", name="flashlight.lib"), 1, "pip install 'kdsuite[ondevice]'"),
        (ModuleNotFoundError("no", name="uvicorn"), 1, "pip install 'kdsuite[serve]'"),
        (ModuleNotFoundError("no", name="unheard_of"), 1, "pip install 'kdsuite[all]'"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from here"),
    ],
)
def test_known_failures_are_one_line(
    error: BaseException | None, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    returned, text = run(error, capsys)
    assert returned == code
    assert said in text
    assert text.count("\n") == (0 if error is None else 1)


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("x"), ModuleNotFoundError("x", name="kdcore.nothing")])
def test_defects_keep_their_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(error)):
        run(error, capsys)


def test_overrides_in_both_forms() -> None:
    words = ["--a.b", "1", "--c.d=x=y", "--e.f", "-1", "--g.h="]
    assert split_overrides(words) == [("a.b", "1"), ("c.d", "x=y"), ("e.f", "-1"), ("g.h", "")]
    assert split_overrides([]) == []
    settings = ["test_view", "seeds"]
    words = ["--test_view", "noise:0:10", "--seeds=[1]"]
    assert split_overrides(words, ["--test", "--seeds"], settings) == [("test_view", "noise:0:10"), ("seeds", "[1]")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--a.b"], "--a.b: wanted a value after it"),
        (["--a.b", "--c.d", "1"], "--a.b: wanted a value after it"),
        (["stray"], "unknown argument 'stray'"),
        (["--sedes", "1"], "unknown argument '--sedes', did you mean --seeds"),
        (["--.", "1"], "unknown argument '--.'"),
        (["--tset_view", "clean"], "unknown argument '--tset_view', did you mean --test_view"),
        (["--test_view"], "--test_view: wanted a value after it"),
        (["test_view", "clean"], "unknown argument 'test_view'"),
    ],
)
def test_words_that_are_no_settings(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_overrides(words, ["--seeds", "--out"], ["test_view", "seeds"])


def test_integers() -> None:
    assert integers("0,1,-2") == [0, 1, -2]
    with pytest.raises(argparse.ArgumentTypeError, match="got '1,x', wanted whole numbers"):
        integers("1,x")


def test_parser_mistakes_are_users_mistakes() -> None:
    parser = Parser(prog="kd x", epilog=example("kd x --k 3"))
    parser.add_argument("--k", type=int)
    parser.add_argument("--what", choices=("quality", "train"))
    assert parser.parse_args(["--k", "3"]).k == 3
    assert "example:\n  kd x --k 3" in parser.format_help()
    for words, message in (
        (["--k", "x"], "--k"),
        (["--what", "qualty"], "did you mean quality"),
        (["--wha", "train"], "--wha"),
    ):
        with pytest.raises(UserError, match=message):
            parser.parse_args(words)
