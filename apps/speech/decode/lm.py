"""Word n-gram models in ARPA files: what is in one is checked line by line, and KenLM scores with it. No torch."""

from __future__ import annotations

import math
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdcore.config import UserError

# what flashlight-text's KenLM is built for
MIN_ORDER, MAX_ORDER = 2, 6
# words that every model has by itself
MARKERS = START, END, UNKNOWN = "<s>", "</s>", "<unk>"
LINE_LIMIT = 65_536  # bytes; no sane n-gram comes near
LOG10 = math.log(10.0)
_LOADING = threading.Lock()


def marker_in(text: str) -> str | None:
    """Return the first word of a text that every model has by itself; None if it holds none."""
    return next((word for word in text.split() if word in MARKERS), None)


def check_arpa(path: str | os.PathLike[str]) -> dict[int, int]:
    """Return the number of n-grams of each order of an ARPA file, having read all of it.

    What KenLM and other tools read passes: spaces or tabs, blank lines, Windows line ends, text before ``\\data\\``,
    missing back-off weights.

    Raises:
        UserError: a file that cannot be read, or with the line what is wrong: no ``\\data\\`` or ``\\end\\``, other
            counts than the header's, a line without as many words as its order, a probability above 1, no <s> or </s>.
    """
    file = Path(path)
    try:
        with open(file, "rb") as handle:
            return _Arpa(file).read(handle)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None


class _Arpa:
    """One reading of an ARPA file."""

    def __init__(self, file: Path) -> None:
        self._file, self._number = file, 0
        self._counts: dict[int, int] = {}

    def read(self, handle: Any) -> dict[int, int]:
        lines = self._lines(handle)
        section = self._header(lines)
        for order in sorted(self._counts):
            if section != f"\\{order}-grams:":
                raise self._error(f"wanted \\{order}-grams:, got {section[:60]!r}")
            section = self._section(lines, order)
        if section != "\\end\\":
            raise self._error(f"wanted \\end\\ after {max(self._counts)}-grams, got {section[:60]!r}")
        return self._counts

    def _error(self, problem: str) -> UserError:
        return UserError(f"{self._file}, line {self._number}: {problem}")

    def _lines(self, handle: Any) -> Iterator[str]:
        while True:
            raw = handle.readline(LINE_LIMIT + 1)
            if not raw:
                return
            self._number += 1
            if self._number == 1 and raw.startswith((b"mmap lm ", b"\x1f\x8b")):
                raise self._error("a KenLM binary or a compressed file, wanted an ARPA text")
            if len(raw) > LINE_LIMIT:
                raise self._error(f"longer than {LINE_LIMIT} bytes, wanted an ARPA text")
            try:
                yield raw.decode("utf-8").strip()
            except UnicodeDecodeError:
                raise self._error("not UTF-8 text") from None

    def _header(self, lines: Iterator[str]) -> str:
        for line in lines:
            if line == "\\data\\":
                break
        else:
            raise self._error("no \\data\\ line, wanted an ARPA text")
        for line in lines:
            if not line:
                continue
            if not line.startswith("ngram"):
                if not self._counts:
                    raise self._error(f"wanted 'ngram 1=COUNT', got {line[:60]!r}")
                return line
            found = re.fullmatch(r"ngram\s+(\d{1,2})\s*=\s*(\d{1,12})", line, re.ASCII)
            if not found or int(found[1]) != len(self._counts) + 1:
                raise self._error(f"wanted 'ngram {len(self._counts) + 1}=COUNT', got {line[:60]!r}")
            self._counts[int(found[1])] = int(found[2])
        raise self._error("the file ends within its header")

    def _section(self, lines: Iterator[str], order: int) -> str:
        """Read the n-grams of one order; return the line that ends them."""
        count, markers = 0, {"<s>", "</s>"}
        for line in lines:
            if not line:
                continue
            if line.startswith("\\") and (line == "\\end\\" or line.endswith("-grams:")):
                break
            self._entry(line.split(), order)
            if order == 1:
                markers.discard(line.split()[1])
            count += 1
        else:
            raise self._error(f"the file ends within the {order}-grams, without \\end\\")
        if count != self._counts[order]:
            raise self._error(f"{count} {order}-grams end here, the header says {self._counts[order]}")
        if order == 1 and markers:
            raise self._error(f"no {' and no '.join(sorted(markers))} among the 1-grams")
        return line

    def _entry(self, fields: list[str], order: int) -> None:
        if len(fields) not in (order + 1, order + 2):
            raise self._error(f"wanted a probability, {order} words and a back-off weight, got {len(fields)} fields")
        probability = self._number_of(fields[0], "log10 probability")
        if probability > 0:
            raise self._error(f"log10 probability: got {fields[0]}, wanted at most 0")
        if len(fields) == order + 2:
            if order == max(self._counts):
                raise self._error(f"wanted a probability and {order} words, got {len(fields)} fields")
            self._number_of(fields[-1], "back-off weight")

    def _number_of(self, text: str, name: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise self._error(f"{name}: got {text[:30]!r}, wanted a number")
        return value


class LanguageModel:
    """An n-gram model of words, read from an ARPA file by KenLM (Heafield, 2011); scores are natural logs.

    A word that is not in the file has the score of ``<unk>``.

    Raises:
        UserError: a file as in ``check_arpa``, or of an order that KenLM is not built for.
    """

    def __init__(self, path: str | os.PathLike[str], words: Sequence[str]) -> None:
        self.order = max(check_arpa(path))
        if not MIN_ORDER <= self.order <= MAX_ORDER:
            raise UserError(f"{path}: a model of order {self.order}, wanted {MIN_ORDER} to {MAX_ORDER}")
        # the module with the base class of KenLM comes first, or it cannot be imported
        import flashlight.lib.text.decoder  # noqa: F401
        from flashlight.lib.text.decoder.kenlm import KenLM
        from flashlight.lib.text.dictionary import Dictionary

        dictionary = Dictionary()
        for index, word in enumerate(words):
            dictionary.add_entry(word, index)
        with _quiet():
            try:
                self._model = KenLM(os.fspath(path), dictionary)
            except RuntimeError as error:
                raise UserError(f"{path}: {' '.join(str(error).split())[-200:]}") from None

    def start(self) -> Any:
        """Return the state at the start of a sentence."""
        return self._model.start(False)

    def score(self, state: Any, word: int) -> tuple[Any, float]:
        """Return the state after a word, and the word's log-probability."""
        after, score = self._model.score(state, word)
        return after, score * LOG10

    def finish(self, state: Any) -> float:
        """Return the log-probability that the sentence ends."""
        return self._model.finish(state)[1] * LOG10

    def alone(self, word: int) -> float:
        """Return the log-probability of a word that nothing is known before."""
        return self._model.score(self._model.start(True), word)[1] * LOG10


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep KenLM's progress bar, which C++ writes, from the standard error."""
    with _LOADING:
        sys.stderr.flush()
        try:
            kept = os.dup(2)
        except OSError:  # no standard error, nothing to keep quiet
            yield
            return
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            os.close(null)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
