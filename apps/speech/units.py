"""The symbols that a model writes: characters, SentencePiece pieces or words, and the blank after them. No torch.

Words are separated by ``▁``: among characters it is a symbol of its own, a piece carries it in front. Either way the
text of a sequence of symbols is their concatenation with ``▁`` read as a space, which is all that a device needs.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from apps.speech.text import BOUNDARY
from kdcore.config import UserError
from kdcore.run import atomic_path, write_text

if TYPE_CHECKING:
    import sentencepiece

BLANK = "<blk>"
TOKENS, MODEL = "tokens.txt", "sentencepiece.model"
_LARGEST_FILE = 1 << 26


@dataclass(frozen=True)
class Units:
    """Symbols by id; the blank is ``len(symbols)``. With a SentencePiece model they are pieces, else characters.

    Raises:
        ValueError: no symbols, one twice, empty or with white space in it, or one that is the blank's name.
    """

    symbols: tuple[str, ...]
    model: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for at, symbol in enumerate(self.symbols):
            if not symbol or symbol == BLANK or symbol.split() != [symbol]:
                raise ValueError(f"symbols: got {symbol!r} at {at}, wanted text without white space, not {BLANK}")
        if not self.symbols or len(self._ids) != len(self.symbols):
            raise ValueError(
                f"symbols: got {len(self.symbols)}, {len(self._ids)} of them distinct, wanted some, once each"
            )

    @property
    def blank(self) -> int:
        """The id of the blank."""
        return len(self.symbols)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {symbol: at for at, symbol in enumerate(self.symbols)}

    @cached_property
    def _pieces(self) -> sentencepiece.SentencePieceProcessor:
        return _processor(self.model or b"", MODEL)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; white space separates words and is otherwise of no matter.

        Raises:
            UserError: the text holds a symbol outside the units; it names both.
        """
        if BOUNDARY in text:
            raise UserError(f"text {_shown(text)}: holds the symbol {BOUNDARY!r}, which stands for the word boundary")
        words = text.split()
        names = self._pieces.encode(" ".join(words), out_type=str) if self.model else list(BOUNDARY.join(words))
        try:
            return [self._ids[name] for name in names]
        except KeyError as error:
            raise UserError(f"text {_shown(text)}: holds {error.args[0]!r}, which is outside the units") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, words separated by one space.

        Raises:
            ValueError: an id that is no symbol (the blank is none).
        """
        names = []
        for each in ids:
            if not 0 <= each < len(self.symbols):
                raise ValueError(f"ids: got {each}, wanted 0 to {len(self.symbols) - 1}")
            names.append(self.symbols[each])
        # pieces go through the model: it puts bytes together where a character has no piece of its own
        text = self._pieces.decode_pieces(names) if self.model else "".join(names).replace(BOUNDARY, " ")
        return " ".join(text.split())

    @classmethod
    def of_characters(cls, texts: Iterable[str]) -> Units:
        """Return the word boundary and the characters of normalised texts, sorted.

        Raises:
            UserError: no text has a character, or one holds the boundary symbol.
        """
        found: set[str] = set()
        for text in texts:
            if BOUNDARY in text:
                raise UserError(f"text {_shown(text)}: holds {BOUNDARY!r}, which stands for the word boundary")
            found.update("".join(text.split()))
        if not found:
            raise UserError("texts: no text has a character to make units of")
        return cls((BOUNDARY, *sorted(found)))

    @classmethod
    def from_sentencepiece(cls, model: str | os.PathLike[str] | bytes) -> Units:
        """Return the pieces of a trained model, from its file or its bytes, without the unknown and control ones.

        Raises:
            UserError: the file is missing or no SentencePiece model.
        """
        name = "SentencePiece model" if isinstance(model, bytes) else os.fspath(model)
        data = model if isinstance(model, bytes) else _read(Path(model))
        loaded = _processor(data, name)
        names = [
            loaded.id_to_piece(each)
            for each in range(loaded.get_piece_size())
            if not (loaded.is_unknown(each) or loaded.is_control(each) or loaded.is_unused(each))
        ]
        try:
            return cls(tuple(names), data)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``tokens.txt`` (``SYMBOL ID`` a line, the blank last) and, for pieces, ``sentencepiece.model``."""
        root = Path(folder)
        if self.model is None:
            (root / MODEL).unlink(missing_ok=True)
        else:
            with atomic_path(root / MODEL) as path:
                path.write_bytes(self.model)
        lines = [f"{symbol} {at}\n" for at, symbol in enumerate((*self.symbols, BLANK))]
        write_text(root / TOKENS, "".join(lines))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Units:
        """Return the units that ``save`` wrote.

        Raises:
            UserError: ``tokens.txt`` is missing or wrong (file and line are named), or the pieces are not the model's.
        """
        root = Path(folder)
        path = root / TOKENS
        symbols = _read_tokens(path)
        if (root / MODEL).is_file():
            units = cls.from_sentencepiece(root / MODEL)
            if units.symbols != symbols:
                raise UserError(f"{path}: does not hold the pieces of {MODEL} beside it; write both again")
            return units
        long = next((at for at, symbol in enumerate(symbols) if len(symbol) > 1), None)
        if long is not None:
            raise UserError(f"{path}: line {long + 1}: {symbols[long]!r} is no character, and {MODEL} is not beside it")
        return cls(symbols)


def train_sentencepiece(
    texts: Iterable[str], size: int, *, kind: Literal["bpe", "unigram"] = "bpe", name: str = "texts"
) -> Units:
    """Return ``size`` pieces learned from normalised texts; the same texts give the same model, byte for byte.

    Options: ``kind`` is byte-pair encoding or the unigram model, which may return fewer pieces where the texts have no
    more. Every character of the texts is covered.

    Raises:
        UserError: no text, or ``size`` is too small for the characters or too large for the texts.

    Reference: Kudo and Richardson, 2018 (SentencePiece).
    """
    if kind not in ("bpe", "unigram"):
        raise ValueError(f"kind: got {kind!r}, wanted 'bpe' or 'unigram'")
    return _trained([" ".join(text.split()) for text in texts if text.strip()], size, kind, name)


def _trained(given: Sequence[str], size: int, kind: str, name: str) -> Units:
    import sentencepiece

    if not given:
        raise UserError(f"{name}: no text to learn pieces from")
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(given),
            model_writer=written,
            vocab_size=size + 1,  # the unknown piece, which is no symbol
            model_type=kind,
            character_coverage=1.0,
            normalization_rule_name="identity",
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            hard_vocab_limit=kind == "bpe",
            max_sentence_length=1 << 20,
            shuffle_input_sentence=False,
            num_threads=1,  # sums over threads depend on their order
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split()).rsplit("] ", 1)[-1]
        raise UserError(f"{name}: {size} pieces cannot be made of {len(given)} texts: {reason}") from None
    return Units.from_sentencepiece(written.getvalue())


def train_words(texts: Iterable[str], *, name: str = "texts") -> Units:
    """Return the distinct words of normalised texts as pieces, the most frequent first; a word outside is no symbol.

    Raises:
        UserError: no text.
    """
    given = [" ".join(text.split()) for text in texts if text.strip()]
    return _trained(given, len({word for text in given for word in text.split()}), "word", name)


def _processor(data: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    import sentencepiece

    try:
        if not data:
            raise RuntimeError("no bytes")
        loaded = sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError:
        raise UserError(f"{name}: is no SentencePiece model") from None
    if not loaded.get_piece_size():
        raise UserError(f"{name}: is a SentencePiece model without pieces")
    return loaded


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise UserError(f"{path}: is larger than {_LARGEST_FILE >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _read_tokens(path: Path) -> tuple[str, ...]:
    try:
        lines = _read(path).decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    symbols: dict[str, None] = {}
    for number, line in enumerate(lines):
        symbol, _, at = line.rstrip("\r").rpartition(" ")
        if at != str(number) or not symbol or symbol.split() != [symbol] or symbol in symbols:
            raise UserError(f"{path}: line {number + 1}: got {line!r}, wanted a symbol not seen before and {number}")
        symbols[symbol] = None
    *others, last = symbols
    if last != BLANK or BLANK in others or not others:
        raise UserError(f"{path}: line {len(lines)}: got {last!r}, wanted {BLANK} there and symbols before it")
    return tuple(others)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def needed_frames(ids: Sequence[int]) -> int:
    """Return the frames that CTC needs for a label sequence: one a symbol and a blank between two that are the same."""
    return len(ids) + sum(first == second for first, second in pairwise(ids))
