"""What a CTC teacher says of every utterance and view, computed once: posteriors, N-best lists, hidden frames.

Everything is on disk, frames a row each and lists ragged, so that one long recording costs what it holds and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from apps.speech.data.batches import HEARD_AT_ONCE, neighbours, padded
from apps.speech.decode.nbest import n_best
from apps.speech.models.base import FRAME_MS, SUBSAMPLING, output_lengths
from kdcore.losses import cut_at_blanks
from kdcore.teacher_cache import CacheEntry, TeacherCache

# rows of a view -> name -> a frame's values [T', ...] of each
Said = Callable[[Sequence[int]], Mapping[str, list[np.ndarray]]]
Progress = Callable[[str, int, int], None]
# utterances whose lists are made and written at a time
_LISTED = 64
# log-posteriors [2 T', C] of half the length of a frame -> [T', C]
Halved = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class NBest:
    """How many hypotheses a list holds, and the beam that finds them."""

    count: int = 4
    beam: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.count <= self.beam:
            raise ValueError(f"n_best: wanted 1 <= count <= beam, got {self}")


@dataclass(frozen=True)
class Cuts:
    """Where utterances are cut into segments: in the middle of ``least`` frames of blank above ``threshold``."""

    least: int = 3
    threshold: float = 0.95
    # frames a student is late: its segments begin and end so much later
    delay: int = 0


@dataclass(frozen=True)
class Segmented:
    """The N best of every segment of an utterance."""

    n_best: NBest
    cuts: Cuts


@dataclass(frozen=True)
class Listed:
    """The N best of an utterance's S segments; a place without a hypothesis has the length 0 and the score -inf.

    Shapes: segments int32 [S, 2], first frame and the one behind the last, with the student's delay; symbols int32
    [S, N, U], U the longest of them; lengths int32 [S, N]; scores float32 [S, N].
    """

    segments: np.ndarray
    symbols: np.ndarray
    lengths: np.ndarray
    scores: np.ndarray


class Lists:
    """The N best of every utterance, one segment or several each, from a cache's ragged fields."""

    def __init__(self, entry: CacheEntry, count: int) -> None:
        self.entry, self.count = entry, count
        # where the segments and the symbols of each row begin
        self.offsets = np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(entry["sizes"], axis=0)])

    def __getitem__(self, row: int) -> Listed:
        (first, begin), (last, end) = self.offsets[row], self.offsets[row + 1]
        lengths, scores = (
            self.entry[name][first * self.count : last * self.count].reshape(-1, self.count)
            for name in ("lengths", "scores")
        )
        symbols = np.zeros((*lengths.shape, int(lengths.max(initial=0))), np.int32)
        # in the order of a mask's places, which is that of the hypotheses
        symbols[np.arange(symbols.shape[2]) < lengths[..., None]] = self.entry["symbols"][begin:end]
        return Listed(self.entry["segments"][2 * first : 2 * last].reshape(-1, 2), symbols, lengths, scores)


class ViewLessons:
    """What one teacher says of one view of the training utterances, of so many feature frames each (int64 [N]).

    ``ask`` gives for some rows ``log_probs`` [T', C] of each, and the output [T', D] of each of ``layers`` (name ->
    width). With ``halved`` it gives log-posteriors of twice as many frames, [2 T', C]: lists of hypotheses are made of
    these, and ``halved`` makes of them the frames that are taught and that segments are counted in.
    Everything is in a teacher cache, keyed by teacher, data and what is asked for.

    Raises:
        ValueError: ``layers`` and ``halved``: layers have no frames but the teacher's own.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        ask: Said,
        cache: TeacherCache,
        *,
        data: str,
        teacher: str,
        classes: int,
        layers: Mapping[str, int] | None = None,
        progress: Progress | None = None,
        halved: Halved | None = None,
    ) -> None:
        if layers and halved is not None:
            raise ValueError(f"layers: got {', '.join(layers)} of a teacher whose frames are halved, wanted none")
        self.ask, self.cache = ask, cache
        self.data, self.teacher, self.classes, self.progress = data, teacher, classes, progress
        self.layers, self.halved = dict(layers or {}), halved
        # frames that ``ask`` gives for one that is taught
        self.finer = 1 if halved is None else 2
        frames = self.finer * output_lengths(torch.from_numpy(np.array(lengths))).numpy()
        self.offsets = np.concatenate([[0], np.cumsum(frames)])
        self._kept: dict[tuple[object, ...], Lists] = {}

    @cached_property
    def frames(self) -> CacheEntry:
        """Log-posteriors float16 [sum of T', C], and the layers asked for; a row a frame that ``ask`` gives."""
        fields: dict[str, tuple[str, tuple[int, ...]]] = {"log_probs": ("<f2", (self.classes,))}
        fields |= {layer: ("<f2", (width,)) for layer, width in self.layers.items()}
        return self.cache.get_or_compute(
            data=self.data,
            teacher=self.teacher,
            kind=f"frames{self._which}",
            n_rows=int(self.offsets[-1]),
            fields=fields,
            compute=self._frames,
            block_rows=16_384 * self.finer,
            progress=self._told("teacher's frames"),
        )

    @property
    def _which(self) -> str:
        """Which frames, for the keys of what is made of them; nothing for those that are taught."""
        return "" if self.halved is None else f" of {FRAME_MS // self.finer} ms"

    def _told(self, what: str) -> Callable[[int, int], None] | None:
        progress = self.progress
        return None if progress is None else lambda done, total: progress(what, done, total)

    def _frames(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Return the frames [start, stop); an utterance that is cut by the bounds is asked for with each block."""
        first = int(np.searchsorted(self.offsets, start, "right")) - 1
        last = int(np.searchsorted(self.offsets, stop, "left"))
        parts: dict[str, list[np.ndarray]] = {}
        for rows in neighbours(np.diff(self.offsets), first, last, frames=HEARD_AT_ONCE * self.finer // SUBSAMPLING):
            said = self.ask(rows)
            for name in ("log_probs", *self.layers):
                parts.setdefault(name, []).extend(said[name])
        begin = start - int(self.offsets[first])
        # float16 ends at 65504, and a posterior of e^-10000 is as good as any smaller one
        whole = {name: np.concatenate(values).clip(-1e4, 1e4).astype(np.float16) for name, values in parts.items()}
        return {name: values[begin : begin + stop - start] for name, values in whole.items()}

    def _asked(self, row: int) -> np.ndarray:
        """Return the log-posteriors float32 [T', C] of an utterance in the frames that ``ask`` gives."""
        values: np.ndarray = self.frames["log_probs"][self.offsets[row] : self.offsets[row + 1]].astype(np.float32)
        return values

    def log_probs(self, row: int) -> np.ndarray:
        """Return the teacher's log-posteriors float32 [T', C] of an utterance, in the frames that are taught."""
        asked = self._asked(row)
        return asked if self.halved is None else self.halved(asked)

    def layer(self, name: str, row: int) -> np.ndarray:
        """Return the output float16 [T', D] of a layer for an utterance."""
        values: np.ndarray = self.frames[name][self.offsets[row] : self.offsets[row + 1]]
        return values

    def hypotheses(self, wanted: NBest) -> Lists:
        """Return the N best of every utterance, each one segment."""
        return self._lists(wanted, None, f"n-best {wanted.count} of beam {wanted.beam}", "teacher's N best")

    def segments(self, row: int, cuts: Cuts, delay: int) -> np.ndarray:
        """Return the segments int64 [S, 2] of an utterance, moved by a delay, in frames that are taught."""
        return _cut(self.log_probs(row), cuts, delay)

    def segment_hypotheses(self, wanted: NBest, cuts: Cuts) -> Lists:
        """Return the N best of every segment of every utterance."""
        kind = f"segments {cuts}, n-best {wanted.count} of beam {wanted.beam}"
        return self._lists(wanted, cuts, kind, "teacher's N best of segments")

    def _lists(self, wanted: NBest, cuts: Cuts | None, kind: str, what: str) -> Lists:
        if (wanted, cuts) not in self._kept:
            entry = self.cache.get_or_compute(
                data=self.data,
                teacher=self.teacher,
                kind=f"{kind}{self._which and f', frames{self._which}'}",
                n_rows=len(self.offsets) - 1,
                # how many segments and symbols an utterance has
                fields={"sizes": ("<i8", (2,))},
                compute=lambda start, stop: _joined([self._list(row, wanted, cuts) for row in range(start, stop)]),
                ragged={"segments": "<i4", "symbols": "<i4", "lengths": "<i4", "scores": "<f4"},
                block_rows=_LISTED,
                progress=self._told(what),
            )
            self._kept[wanted, cuts] = Lists(entry, wanted.count)
        return self._kept[wanted, cuts]

    def _list(self, row: int, wanted: NBest, cuts: Cuts | None) -> Found:
        """Return the N best of an utterance's segments, or of it as one."""
        asked = self._asked(row)
        if cuts is None:
            own = late = np.array([[0, len(asked) // self.finer]])
        else:
            taught = asked if self.halved is None else self.halved(asked)
            own, late = (_cut(taught, cuts, delay) for delay in (0, cuts.delay))
        bounds = (own * self.finer).tolist()
        # of no frames there is no hypothesis
        found = [n_best(asked[low:high], wanted.count, beam=wanted.beam) if high > low else [] for low, high in bounds]
        lengths = np.zeros((len(own), wanted.count), np.int32)
        scores = np.full((len(own), wanted.count), -np.inf, np.float32)
        for place, hypotheses in enumerate(found):
            lengths[place, : len(hypotheses)] = [len(each.ids) for each in hypotheses]
            scores[place, : len(hypotheses)] = [each.score for each in hypotheses]
        symbols = [symbol for hypotheses in found for each in hypotheses for symbol in each.ids]
        return Found(late.astype(np.int32), np.array(symbols, np.int32), lengths, scores)


class Found(NamedTuple):
    """What is stored of an utterance: as ``Listed``, but its symbols int32 [n], one hypothesis behind the other."""

    segments: np.ndarray
    symbols: np.ndarray
    lengths: np.ndarray
    scores: np.ndarray


def _cut(log_probs: np.ndarray, cuts: Cuts, delay: int) -> np.ndarray:
    """Return the segments int64 [S, 2] of log-posteriors [T', C], moved by a delay."""
    found = cut_at_blanks(
        torch.from_numpy(log_probs)[None],
        torch.tensor([len(log_probs)]),
        blank=log_probs.shape[1] - 1,
        threshold=cuts.threshold,
        least=cuts.least,
        delay=delay,
    )
    return found[0].numpy()


def _joined(found: Sequence[Found]) -> dict[str, np.ndarray]:
    """Return the fields of some utterances as they are stored."""
    sizes = np.array([[len(each.segments), len(each.symbols)] for each in found], np.int64)
    joined = {name: np.concatenate([getattr(each, name).reshape(-1) for each in found]) for name in Found._fields}
    return {"sizes": sizes, **joined}


@dataclass(frozen=True)
class TeacherLessons:
    """What terms are given of a teacher, for rows in their views: ``Lessons`` of the teaching step.

    Values: ``teacher`` (log-posteriors [B, T', C]); ``teacher.LAYER``; ``hypotheses``, ``hypothesis_lengths`` and
    ``log_scores`` of the utterance; ``segments``, and theirs as ``segment.hypotheses`` and so on.
    """

    # what is said of each view of the student's data, in the same order
    views: Sequence[ViewLessons]
    posteriors: bool = False
    n_best: NBest | None = None
    segmented: Segmented | None = None

    def make(self) -> None:
        """Ask the teachers for all of it, or find it in their caches; one of several processes does it for all."""
        for place in range(len(self.views)):
            self.of(np.zeros(1, np.int64), np.full(1, place), 1)

    def of(self, rows: np.ndarray, views: np.ndarray, frames: int) -> dict[str, Tensor]:
        """Return the values of rows, each in its view."""
        pairs = list(zip(rows.tolist(), (self.views[view] for view in views), strict=True))
        values: dict[str, Tensor] = {}
        if self.posteriors:
            values["teacher"] = torch.from_numpy(padded([said.log_probs(row) for row, said in pairs]))
        for name in self.views[0].layers:
            given = [said.layer(name, row) for row, said in pairs]
            values[f"teacher.{name}"] = torch.from_numpy(padded(given)).float()
        if self.n_best is not None:
            wanted = self.n_best
            found = _of_rows(pairs, lambda said: said.hypotheses(wanted))
            # one segment, the utterance
            values |= _listed(
                [Listed(each.segments, each.symbols[0], each.lengths[0], each.scores[0]) for each in found]
            )
        if self.segmented is not None:
            of_segments = self.segmented
            found = _of_rows(pairs, lambda said: said.segment_hypotheses(of_segments.n_best, of_segments.cuts))
            values["segments"] = _stacked([each.segments for each in found]).long()
            values |= {f"segment.{name}": value for name, value in _listed(found).items()}
        return values


def _of_rows(pairs: Sequence[tuple[int, ViewLessons]], lists: Callable[[ViewLessons], Lists]) -> list[Listed]:
    """Return what is listed of some rows, each in its view."""
    each = {id(said): lists(said) for _, said in pairs}
    return [each[id(said)][row] for row, said in pairs]


def _listed(found: Sequence[Listed]) -> dict[str, Tensor]:
    """Return lists of some rows as terms are given them."""
    return {
        "hypotheses": _stacked([each.symbols for each in found], least=1).long(),
        "hypothesis_lengths": _stacked([each.lengths for each in found]).long(),
        "log_scores": _stacked([each.scores for each in found]),
    }


def _stacked(rows: Sequence[np.ndarray], least: int = 0) -> Tensor:
    """Return arrays whose sizes differ as one, filled up: scores with -inf, for no hypothesis, all else with 0.

    The last axis has at least so many places.
    """
    fill = -np.inf if rows[0].dtype.kind == "f" else 0
    *sizes, last = (max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True))
    out = np.full((len(rows), *sizes, max(last, least)), fill, rows[0].dtype)
    for place, row in enumerate(rows):
        out[place][tuple(slice(size) for size in row.shape)] = row
    return torch.from_numpy(out)
