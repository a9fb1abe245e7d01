"""What every command shares: one-line errors, exit codes, ``--a.b value`` overrides."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from kdcore.config import UserError, nearest

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and whose help keeps the example's line breaks."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        options.setdefault("allow_abbrev", False)
        super().__init__(*args, **options)

    def options(self) -> list[str]:
        """Return the options this parser knows, such as ``--out``."""
        return sorted(name for name in self._option_string_actions if name.startswith("--"))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a value that is not one of the choices, naming the nearest instead of all."""
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"got {value!r}, {nearest(str(value), map(str, action.choices))}")

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with 2."""
        raise UserError(f"{message} (see {self.prog} --help)")


def example(*lines: str) -> str:
    """Return an epilog with examples."""
    return "example" + ("s" if len(lines) > 1 else "") + ":\n" + "\n".join(f"  {line}" for line in lines)


def split_overrides(
    words: Sequence[str], known: Sequence[str] = (), settings: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """Return ``--a.b value`` and ``--a.b=value`` words as (path, text); anything else is a UserError.

    ``settings`` are the names that stand without a dot, ``known`` the command's options: an unknown name may be a
    misspelling of either.
    """
    overrides = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        path = name.removeprefix("--")
        if path == name or not ("." in path.strip("-.") or path in settings):
            raise unknown_argument(word, list(dict.fromkeys([*known, *(f"--{setting}" for setting in settings)])))
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"{name}: wanted a value after it")
            value = rest.pop(0)
        overrides.append((path, value))
    return overrides


def unknown_argument(word: str, known: Sequence[str]) -> UserError:
    """Return the error for a word that no option takes."""
    name = word.partition("=")[0]
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.6) if name.startswith("--") else []
    hint = f"did you mean {' or '.join(near)}?" if near else "see --help; settings are given as --a.b value"
    return UserError(f"unknown argument {word!r}, {hint}")


def integers(text: str) -> list[int]:
    """Return ``0,1,2`` as a list of integers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted whole numbers such as 0,1,2") from None


def guarded(command: Callable[[], int], name: str = "kd") -> int:
    """Run a command and return its exit code.

    A mistake of the user's (a UserError, a path that cannot be used) is one line and 2; a failure that is known (a loss
    that is not finite, a full disk, a package that is not installed) is one line and 1; Ctrl-C is 130. A broken pipe
    ends quietly. Anything else is a defect and keeps its traceback.
    """
    try:
        return command()
    except UserError as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE
    except FloatingPointError as error:
        print(f"{name}: failed: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "apps", "kdcore", "data_scripts"):
            raise
        hint = f"pip install 'kdsuite[{_extra_with(package)}]'"
        print(f"{name}: failed: this needs the package {package}: {hint}", file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return EXIT_FAILURE
    except OSError as error:
        print(f"{name}: {_path_problem(error)}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, _PATH_ERRORS) else EXIT_FAILURE


# what a path that the user gave can be guilty of
_PATH_ERRORS = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)


def _path_problem(error: OSError) -> str:
    kind = "error" if isinstance(error, _PATH_ERRORS) else "failed"
    what = f"{error.filename}: {error.strerror}" if error.filename else " ".join(str(error).split())
    return f"{kind}: {what}"


def _extra_with(package: str) -> str:
    """Return the extra that brings a package, the smallest first; all where none says so itself."""
    from importlib import metadata

    try:
        asked = metadata.requires("kdsuite") or []
    except metadata.PackageNotFoundError:  # a checkout that was not installed
        asked = []
    wanted = package.replace("_", "-").lower()
    found = set()
    for text in asked:
        match = re.match(r"([A-Za-z0-9._-]+).*extra == ['\"]([a-z]+)['\"]", text)
        # flashlight is what flashlight-text brings
        if match and match[1].replace("_", "-").lower() in (wanted, f"{wanted}-text"):
            found.add(match[2])
    return next((extra for extra in ("ondevice", "serve", "speech", "recsys", "train") if extra in found), "all")
