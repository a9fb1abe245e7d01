"""What every command shares: one-line errors, exit codes, ``--a.b value`` overrides."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from kdcore.config import UserError

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and whose help keeps the example's line breaks."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        options.setdefault("allow_abbrev", False)
        super().__init__(*args, **options)

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with 2."""
        raise UserError(f"{message} (see {self.prog} --help)")


def example(*lines: str) -> str:
    """Return an epilog with examples."""
    return "example" + ("s" if len(lines) > 1 else "") + ":\n" + "\n".join(f"  {line}" for line in lines)


def split_overrides(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return ``--a.b value`` and ``--a.b=value`` words as (path, text); anything else is a UserError."""
    overrides = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not (name.startswith("--") and "." in name.strip("-.")):
            raise UserError(f"unknown argument {word!r} (see --help; settings are given as --a.b value)")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"{name}: wanted a value after it")
            value = rest.pop(0)
        overrides.append((name.removeprefix("--"), value))
    return overrides


def integers(text: str) -> list[int]:
    """Return ``0,1,2`` as a list of integers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted whole numbers such as 0,1,2") from None


def guarded(command: Callable[[], int], name: str = "kd") -> int:
    """Run a command: a UserError is one line and 2, Ctrl-C is 130, a broken pipe ends quietly."""
    try:
        return command()
    except UserError as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE
    except FloatingPointError as error:
        print(f"{name}: failed: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return EXIT_FAILURE
