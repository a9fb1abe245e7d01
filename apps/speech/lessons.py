"""What a CTC teacher says of every utterance and view, computed once: posteriors, N-best lists, hidden frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from apps.speech.data.batches import padded
from apps.speech.decode.nbest import n_best
from apps.speech.models.base import output_lengths
from kdcore.losses import cut_at_blanks
from kdcore.teacher_cache import CacheEntry, TeacherCache

# rows of a view -> name -> a frame's values [T', ...] of each
Said = Callable[[Sequence[int]], Mapping[str, list[np.ndarray]]]
Progress = Callable[[str, int, int], None]


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


class ViewLessons:
    """What one teacher says of one view of the training utterances, of so many feature frames each (int64 [N]).

    ``ask`` gives for some rows ``log_probs`` [T', C] of each, and the output [T', D] of each of ``layers`` (name ->
    width).
    Everything is in a teacher cache, keyed by teacher, data and what is asked for.
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
    ) -> None:
        self.ask, self.cache = ask, cache
        self.data, self.teacher, self.classes, self.progress = data, teacher, classes, progress
        self.layers = dict(layers or {})
        frames = output_lengths(torch.from_numpy(np.array(lengths))).numpy()
        self.offsets = np.concatenate([[0], np.cumsum(frames)])
        self._kept: dict[tuple[object, ...], CacheEntry] = {}

    @cached_property
    def frames(self) -> CacheEntry:
        """Log-posteriors float16 [sum of T', C], and the layers asked for; a row a frame."""
        fields: dict[str, tuple[str, tuple[int, ...]]] = {"log_probs": ("<f2", (self.classes,))}
        fields |= {layer: ("<f2", (width,)) for layer, width in self.layers.items()}
        return self.cache.get_or_compute(
            data=self.data,
            teacher=self.teacher,
            kind="frames",
            n_rows=int(self.offsets[-1]),
            fields=fields,
            compute=self._frames,
            block_rows=16_384,
            progress=self._told("teacher's frames"),
        )

    def _told(self, what: str) -> Callable[[int, int], None] | None:
        progress = self.progress
        return None if progress is None else lambda done, total: progress(what, done, total)

    def _frames(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Return the frames [start, stop); an utterance that is cut by the bounds is asked for with each block."""
        first = int(np.searchsorted(self.offsets, start, "right")) - 1
        last = int(np.searchsorted(self.offsets, stop, "left"))
        parts: dict[str, list[np.ndarray]] = {}
        for low in range(first, last, 16):
            said = self.ask(range(low, min(low + 16, last)))
            for name in ("log_probs", *self.layers):
                parts.setdefault(name, []).extend(said[name])
        begin = start - int(self.offsets[first])
        # float16 ends at 65504, and a posterior of e^-10000 is as good as any smaller one
        whole = {name: np.concatenate(values).clip(-1e4, 1e4).astype(np.float16) for name, values in parts.items()}
        return {name: values[begin : begin + stop - start] for name, values in whole.items()}

    def log_probs(self, row: int) -> np.ndarray:
        """Return the teacher's log-posteriors float32 [T', C] of an utterance."""
        values: np.ndarray = self.frames["log_probs"][self.offsets[row] : self.offsets[row + 1]].astype(np.float32)
        return values

    def hypotheses(self, wanted: NBest) -> CacheEntry:
        """Return the N best of every utterance: ``symbols`` int32 [n, N, U], ``lengths`` [n, N], ``scores`` [n, N]."""
        if (wanted,) not in self._kept:
            self._kept[wanted,] = self._hypotheses(wanted)
        return self._kept[wanted,]

    def _hypotheses(self, wanted: NBest) -> CacheEntry:
        longest = max(int(np.diff(self.offsets).max(initial=0)), 1)

        def compute(start: int, stop: int) -> dict[str, np.ndarray]:
            return _listed([self.log_probs(row) for row in range(start, stop)], wanted, longest)

        return self.cache.get_or_compute(
            data=self.data,
            teacher=self.teacher,
            kind=f"n-best {wanted.count} of beam {wanted.beam}",
            n_rows=len(self.offsets) - 1,
            fields=_fields((wanted.count,), longest),
            compute=compute,
            block_rows=64,
            progress=self._told("teacher's N best"),
        )

    def segments(self, row: int, cuts: Cuts, delay: int) -> np.ndarray:
        """Return the segments int64 [S, 2] of an utterance, moved by a delay."""
        log_probs = torch.from_numpy(self.log_probs(row))[None]
        found = cut_at_blanks(
            log_probs,
            torch.tensor([log_probs.shape[1]]),
            blank=self.classes - 1,
            threshold=cuts.threshold,
            least=cuts.least,
            delay=delay,
        )
        return found[0].numpy()

    def segment_hypotheses(self, wanted: NBest, cuts: Cuts) -> CacheEntry:
        """Return the N best of every segment, and ``segments`` int32 [n, S, 2] with the student's delay."""
        if (wanted, cuts) not in self._kept:
            self._kept[wanted, cuts] = self._segment_hypotheses(wanted, cuts)
        return self._kept[wanted, cuts]

    def _segment_hypotheses(self, wanted: NBest, cuts: Cuts) -> CacheEntry:
        own = [self.segments(row, cuts, 0) for row in range(len(self.offsets) - 1)]
        count = max((len(each) for each in own), default=1)
        longest = max((int((each[:, 1] - each[:, 0]).max(initial=0)) for each in own), default=1)

        def compute(start: int, stop: int) -> dict[str, np.ndarray]:
            listed, late = [], np.zeros((stop - start, count, 2), np.int32)
            for place, row in enumerate(range(start, stop)):
                log_probs, delayed = self.log_probs(row), self.segments(row, cuts, cuts.delay)
                late[place, : len(delayed)] = delayed
                listed += [log_probs[low:high] for low, high in own[row]]
                listed += [log_probs[:0]] * (count - len(own[row]))
            found = _listed(listed, wanted, max(longest, 1))
            shaped = {name: value.reshape(stop - start, count, *value.shape[1:]) for name, value in found.items()}
            return {**shaped, "segments": late}

        return self.cache.get_or_compute(
            data=self.data,
            teacher=self.teacher,
            kind=f"segments {cuts}, n-best {wanted.count} of beam {wanted.beam}",
            n_rows=len(self.offsets) - 1,
            fields={**_fields((count, wanted.count), max(longest, 1)), "segments": ("<i4", (count, 2))},
            compute=compute,
            block_rows=64,
            progress=self._told("teacher's N best of segments"),
        )


def _fields(shape: tuple[int, ...], longest: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {"symbols": ("<i4", (*shape, longest)), "lengths": ("<i4", shape), "scores": ("<f4", shape)}


def _listed(utterances: Sequence[np.ndarray], wanted: NBest, longest: int) -> dict[str, np.ndarray]:
    """Return the N best of log-posteriors [T, C] each; a place without a hypothesis has the score -inf."""
    symbols = np.zeros((len(utterances), wanted.count, longest), np.int32)
    lengths = np.zeros((len(utterances), wanted.count), np.int32)
    scores = np.full((len(utterances), wanted.count), -np.inf, np.float32)
    for row, log_probs in enumerate(utterances):
        if not len(log_probs):
            continue
        for place, found in enumerate(n_best(log_probs, wanted.count, beam=wanted.beam)):
            symbols[row, place, : len(found.ids)] = found.ids
            lengths[row, place], scores[row, place] = len(found.ids), found.score
    return {"symbols": symbols, "lengths": lengths, "scores": scores}


@dataclass(frozen=True)
class TeacherLessons:
    """What terms are given of a teacher, for rows in their views: ``Lessons`` of the teaching step.

    Values: ``teacher`` (log-posteriors [B, T', C]); ``teacher.LAYER``; ``hypotheses``, ``hypothesis_lengths``,
    ``log_scores`` of the utterance or, where ``cuts`` are given, of ``segments``.
    """

    # what is said of each view of the student's data, in the same order
    views: Sequence[ViewLessons]
    posteriors: bool = False
    n_best: NBest | None = None
    cuts: Cuts | None = None

    def of(self, rows: np.ndarray, views: np.ndarray, frames: int) -> dict[str, Tensor]:
        """Return the values of rows, each in its view."""
        pairs = list(zip(rows.tolist(), (self.views[view] for view in views), strict=True))
        values: dict[str, Tensor] = {}
        names = [*(["log_probs"] if self.posteriors else []), *self.views[0].layers]
        for name in names:
            given = [said.frames[name][said.offsets[row] : said.offsets[row + 1]] for row, said in pairs]
            values["teacher" if name == "log_probs" else f"teacher.{name}"] = torch.from_numpy(padded(given)).float()
        if self.n_best is not None:
            values |= self._listed(pairs)
        return values

    def _listed(self, pairs: Sequence[tuple[int, ViewLessons]]) -> dict[str, Tensor]:
        entries = {id(said): self._entry(said) for _, said in pairs}
        found = {
            name: [entries[id(said)][name][row] for row, said in pairs] for name in ("symbols", "lengths", "scores")
        }
        names = {"symbols": "hypotheses", "lengths": "hypothesis_lengths", "scores": "log_scores"}
        values = {names[name]: torch.from_numpy(_stacked(each)) for name, each in found.items()}
        if self.cuts is not None:
            segments = _stacked([entries[id(said)]["segments"][row] for row, said in pairs])
            values["segments"] = torch.from_numpy(segments).long()
        longest = max(int(values["hypothesis_lengths"].max()), 1)
        values["hypotheses"] = values["hypotheses"][..., :longest].long()
        values["hypothesis_lengths"] = values["hypothesis_lengths"].long()
        return values

    def _entry(self, said: ViewLessons) -> CacheEntry:
        if self.n_best is None:
            raise ValueError("n_best: wanted, for hypotheses")
        return said.hypotheses(self.n_best) if self.cuts is None else said.segment_hypotheses(self.n_best, self.cuts)


def _stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return arrays whose sizes differ as one, filled up: scores with -inf, for no hypothesis, all else with 0."""
    fill = -np.inf if rows[0].dtype.kind == "f" else 0
    shape = tuple(max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True))
    out = np.full((len(rows), *shape), fill, rows[0].dtype)
    for place, row in enumerate(rows):
        out[place][tuple(slice(size) for size in row.shape)] = row
    return out
