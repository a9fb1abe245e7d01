"""The model card of an export: what the model is, what it was trained on and how well it does, from facts alone.

Nothing is said that is not in the facts: where a run has no figure, the card has no sentence. ``run_facts`` reads them
from a finished run. No torch to write a card; to read a run, what runs need.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.speech.device.folder import CLIP, INT8_MODEL, MODEL
from apps.speech.features import TAIL_MS
from kdcore.config import UserError
from kdcore.run import read_json

if TYPE_CHECKING:
    from apps.speech.pipeline import Pipeline

ROLES = {"teacher": "teacher", "student_alone": "student alone", "student": "student"}
DECODINGS = {"wer": "best path", "wer_lm": "lexicon and language model"}
# files beside recordings that say under which licence they are
_LICENCE_FILES = ("SOURCE.md", "README.md", "README", "README.txt")
_LICENCE = re.compile(r"^[\s#*-]*licen[cs]e\b[^:\n]{0,60}:[\s*]*(\S.*)$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Rate:
    """The word error rate of one system on the test part, 0.1 for 10 %, with the interval of a bootstrap."""

    # a key of ROLES, and one of DECODINGS
    role: str
    decoding: str
    model: str
    parameters: int
    value: float
    low: float | None
    high: float | None
    level: float
    utterances: int
    words: int


@dataclass(frozen=True)
class Difference:
    """The student's error rate less another system's, over ``seeds`` runs, with its paired interval."""

    role: str
    other: str
    decoding: str
    value: float
    low: float | None
    high: float | None
    level: float
    seeds: int
    # what was resampled: utterance or speaker
    by: str


@dataclass(frozen=True)
class RunFacts:
    """What a run knows of the model: its data, its recipe and its figures."""

    data: str
    # as it stands beside the recordings or was given; None where neither says
    licence: str | None
    # the corpora that are simulated, and whether all are
    simulated: tuple[str, ...]
    all_simulated: bool
    # of each part: part, utterances, hours, speakers, words
    parts: tuple[dict[str, Any], ...]
    recipe: str
    title: str
    reference: str
    role: str
    seed: int | None
    # ways of teaching, none of a student alone
    knowledge: tuple[str, ...] = ()
    rates: tuple[Rate, ...] = ()
    differences: tuple[Difference, ...] = ()
    # milliseconds from the end of a word to its appearance: p50, p90
    delays: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelFile:
    """One file of weights, compared with float32 on the clips of the export."""

    name: str
    bytes: int
    # clips, and how many of them have the text that the float32 model hears
    clips: int
    same: int
    # word error rate where the clips have texts
    wer: float | None


@dataclass(frozen=True)
class Card:
    """All that a card says."""

    name: str
    kind: str
    parameters: int
    units: str
    symbols: int
    chunk_ms: int
    look_ahead_ms: int
    # the largest difference of log-probabilities between onnxruntime and PyTorch
    parity: float
    models: tuple[ModelFile, ...]
    # which recording the self-test clip is
    clip: str
    # model file -> what it hears in the clip
    clip_texts: Mapping[str, str]
    run: RunFacts | None = None


def render(card: Card) -> str:
    """Return the card as Markdown."""
    parts = [_head(card)]
    if card.run is not None:
        parts += [_data(card.run), _training(card.run), _accuracy(card.run)]
    parts += [_files(card), _usage(card)]
    return "\n\n".join(part for part in parts if part) + "\n"


def tail_seconds(chunk_ms: int) -> float:
    """Return the silence that sherpa-onnx needs behind a recording to decode all of it, in seconds.

    What training has behind every utterance, a window that may just have begun, and the frames that sherpa-onnx wants
    to see behind a window before it decodes it.
    """
    return (TAIL_MS + chunk_ms + 30) / 1000


def _head(card: Card) -> str:
    rows = [
        ("network", f"{card.kind}, {card.parameters:,} parameters"),
        ("writes", f"{card.symbols:,} {card.units} and the blank of CTC"),
        ("audio", "16 kHz, one channel; 80 log-mel bins each 10 ms"),
        ("chunk", f"{card.chunk_ms} ms of audio a step"),
        ("look-ahead", f"{card.look_ahead_ms} ms"),
    ]
    if card.run is not None:
        rows.append(("made by", f"kdsuite, recipe `{_plain(card.run.recipe)}`"))
    return f"# {_plain(card.name)}\n\nA streaming speech recogniser (CTC).\n\n{_table(('', ''), rows)}"


def _data(run: RunFacts) -> str:
    licence = f"Licence of the data: {_plain(run.licence)}" if run.licence else "The data states no licence."
    text = f"## Data\n\n{_plain(run.data)}. {licence}"
    if run.all_simulated:
        text += (
            "\n\n**The recordings are simulated: a speech synthesiser spoke made-up sentences.** All figures below are "
            "on simulated speech. They compare the models with each other; how well any of them hears people was not "
            "measured."
        )
    elif run.simulated:
        names = ", ".join(map(_plain, run.simulated))
        text += f"\n\n**Of these, {names} is simulated: a speech synthesiser spoke made-up sentences.**"
    if run.parts:
        known = ("part", "utterances", "hours", "speakers", "words", "corpora")
        head = [name for name in known if any(name in part for part in run.parts)]
        text += "\n\n" + _table(head, [[_plain(str(part.get(name, ""))) for name in head] for part in run.parts])
    return text


def _training(run: RunFacts) -> str:
    what = {
        "student": f"A student taught by a teacher ({', '.join(run.knowledge)})." if run.knowledge else "",
        "student_alone": "A student trained on the texts alone, without a teacher.",
        "teacher": "A teacher.",
    }[run.role]
    title = f"{_plain(run.title)}." if run.title else ""
    reference = f"After {_plain(run.reference)}." if run.reference else ""
    seed = f"Seed {run.seed}." if run.seed is not None else ""
    return "## Training\n\n" + " ".join(part for part in (title, reference, what, seed) if part)


def _accuracy(run: RunFacts) -> str:
    if not run.rates:
        return ""
    first = run.rates[0]
    rows = [
        [
            f"**{ROLES[rate.role]}**" if rate.role == run.role else ROLES[rate.role],
            _plain(rate.model),
            f"{rate.parameters:,}",
            DECODINGS[rate.decoding],
            _percent(rate.value),
            _interval(rate.low, rate.high),
        ]
        for rate in run.rates
    ]
    head = ("system", "model", "parameters", "decoded by", "WER %", f"{first.level:.0%} interval")
    text = (
        f"## Word error rate\n\nOn the test part ({first.utterances:,} utterances, {first.words:,} words); intervals "
        f"by bootstrap over utterances. This model is in bold.\n\n{_table(head, rows)}"
    )
    if run.differences:
        names = ("difference", "decoded by", "points of WER", "interval", "over", "seeds")
        differences = [
            [
                f"{ROLES[each.role]} − {ROLES[each.other]}",
                DECODINGS[each.decoding],
                f"{100 * each.value:+.1f}",
                _interval(each.low, each.high, sign="+"),
                f"{each.by}s",
                str(each.seeds),
            ]
            for each in run.differences
        ]
        text += f"\n\nPaired over the same utterances (below 0: the first is better):\n\n{_table(names, differences)}"
    if {"p50", "p90"} <= set(run.delays):
        text += (
            f"\n\nA right word appears {run.delays['p50']:.0f} ms after its end (median; 90 % within "
            f"{run.delays['p90']:.0f} ms), by the teacher's alignment, the time to compute not counted."
        )
    return text


def _files(card: Card) -> str:
    rows = [
        [
            f"`{each.name}`",
            f"{each.bytes:,}",
            f"{each.same:,} of {each.clips:,}",
            "" if each.wer is None else _percent(each.wer),
        ]
        for each in card.models
    ]
    return (
        "## Files\n\n"
        + _table(("file", "bytes", "same text as float32", "WER %"), rows)
        + "\n\nTexts of best paths by onnxruntime, on the recordings that were at hand at the export. In float32 "
        f"onnxruntime and PyTorch differ by at most {card.parity:.1g} in log-probability.\n\n"
        f"`{CLIP}` is {_plain(card.clip)}; {_heard(card.clip_texts)}. `kdsuite.json` lists all "
        "files with their hashes, and `kd speech check .` verifies them."
    )


def _heard(texts: Mapping[str, str]) -> str:
    """Return what the models hear in the clip, each by itself where they differ."""
    if len(set(texts.values())) == 1:
        return f"{'the models hear' if len(texts) > 1 else 'the model hears'} {_code(next(iter(texts.values())))} in it"
    return "in it " + ", ".join(f"`{name}` hears {_code(text)}" for name, text in texts.items())


def _usage(card: Card) -> str:
    tail = tail_seconds(card.chunk_ms)
    file = INT8_MODEL if any(each.name == INT8_MODEL for each in card.models) else MODEL
    return f"""## Use

With kdsuite (words with times and confidences, hot words, subtitles, live audio):

```sh
kd speech transcribe --model . {CLIP}
```

With sherpa-onnx, on any of its platforms. It decodes whole windows of {card.chunk_ms} ms, each once more audio is there
than the window holds, so put {tail:.2f} s of silence behind a recording, or its last words are lost:

```python
import numpy as np
import sherpa_onnx
import soundfile

recognizer = sherpa_onnx.OnlineRecognizer.from_nemo_ctc(tokens="tokens.txt", model="{file}", num_threads=1)
stream = recognizer.create_stream()
samples, rate = soundfile.read("{CLIP}", dtype="float32")
stream.accept_waveform(rate, samples)
stream.accept_waveform(rate, np.zeros(int({tail:.2f} * rate), np.float32))
stream.input_finished()
while recognizer.is_ready(stream):
    recognizer.decode_stream(stream)
print(recognizer.get_result(stream).strip())
```"""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _plain(text: str) -> str:
    """Return a text of somebody else's as one line that is no mark-up."""
    return re.sub(r"([\\`*_\[\]<>])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    if "`" in text:
        return f"`` {text} ``"
    return f"`{text}`" if text else "nothing"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _interval(low: float | None, high: float | None, sign: str = "") -> str:
    return "none" if low is None or high is None else f"{100 * low:{sign}.1f} to {100 * high:{sign}.1f}"


# -- facts of a run ----------------------------------------------------------------------------------------------------


def run_facts(pipeline: Pipeline, role: str, licence: str | None = None) -> RunFacts:
    """Return what a finished run knows of its deployed model of a role.

    Options: ``licence`` of the data; otherwise what stands beside the recordings.

    Raises:
        UserError: the run was not evaluated, or has no such model.
    """
    config, run, sources = pipeline.config, pipeline.run, pipeline.prepared.sources
    seed = deployed_seed(run.path, role)
    rows = [row for row in run.read_metrics() if row["split"] == "test" and row["seed"] == seed]
    own = [row for row in rows if row["role"] == role]
    if not own:
        raise UserError(f"{run.path}: was not evaluated; run `kd speech evaluate --out {run.path}` first")
    prefix = "delay_ms_"
    metrics = own[0]["metrics"].items()
    return RunFacts(
        data=config.data.name,
        licence=licence or licence_of(pipeline),
        simulated=tuple(str(each["name"]) for each in sources if each["simulated"]),
        all_simulated=bool(sources) and all(each["simulated"] for each in sources),
        parts=tuple(pipeline.prepared.statistics()),
        recipe=config.recipe,
        title=config.title,
        reference=config.reference,
        role=role,
        seed=seed,
        knowledge=tuple(config.knowledge) if role == "student" else (),
        rates=tuple(_rates(pipeline, seed, rows)),
        differences=tuple(_differences(pipeline)),
        delays={name.removeprefix(prefix): value for name, value in metrics if name.startswith(prefix)},
    )


def deployed_seed(run: Path, role: str) -> int:
    """Return the seed whose model of a role is at the top of a run; UserError if none is."""
    file = run / role / "model.json"
    if not file.exists():
        raise UserError(f"{run / role}: no model here; wanted a run that `kd speech run` finished")
    about = read_json(file, dict)
    for folder in sorted((run / "seeds").glob("*")):
        other = folder / role / "model.json"
        if folder.name.isdigit() and other.exists() and read_json(other) == about:
            return int(folder.name)
    raise UserError(f"{run / role}: is none of the models of {run / 'seeds'}")


def _rates(pipeline: Pipeline, seed: int, rows: Sequence[dict[str, Any]]) -> Iterable[Rate]:
    from apps.speech.evaluate import Scores

    by_role = {row["role"]: row for row in rows}
    for decoding in DECODINGS:
        for cell in pipeline.cells(seed):
            file = cell.folder.parent / "evaluation" / f"test-{cell.role}-{decoding}-{seed}.jsonl"
            row = by_role.get(cell.role)
            if row is None or not file.exists():
                continue
            scores = Scores.load(file)
            found = scores.interval("wer")
            yield Rate(
                role=cell.role,
                decoding=decoding,
                model=row["model"],
                parameters=row["params"],
                value=found.value,
                low=found.low,
                high=found.high,
                level=found.level,
                utterances=len(scores),
                words=int(scores.words.sum()),
            )


def _differences(pipeline: Pipeline) -> Iterable[Difference]:
    file = pipeline.run.path / "comparisons.json"
    for row in read_json(file, list) if file.exists() else []:
        if row["split"] == "test" and row["metric"] in DECODINGS:
            yield Difference(
                role=row["a"]["role"],
                other=row["b"]["role"],
                decoding=row["metric"],
                value=row["difference"],
                low=row["low"],
                high=row["high"],
                level=row["level"],
                seeds=row["n_seeds"],
                by=row.get("by", "utterance"),
            )


def licence_of(pipeline: Pipeline) -> str | None:
    """Return what stands beside the recordings of a run on their licence, or None."""
    given = pipeline.config.data.corpora
    return stated_licences([text for each in given for text in ([each] if isinstance(each, str) else each)])


def stated_licences(corpora: Iterable[str]) -> str | None:
    """Return what stands beside some corpora on their licences, or None."""
    from apps.speech.data.corpora import find_data, parse_corpus

    found: dict[str, str] = {}
    for text in corpora:
        name, _ = parse_corpus(text)
        source = find_data(name)
        stated = stated_licence(source if source.is_dir() else source.parent)
        if stated:
            found[Path(name).name] = stated
    if len(found) == 1:
        return next(iter(found.values()))
    return "; ".join(f"{name}: {stated}" for name, stated in found.items()) or None


def stated_licence(folder: Path) -> str | None:
    """Return the licence that a corpus states in ``dataset.json``, or in a line "Licence: ..." of its description."""
    about = folder / "dataset.json"
    if about.is_file():
        try:
            values = read_json(about)
        except (OSError, ValueError):  # a file of that name may be of anything else
            values = None
        for name in ("licence", "license"):
            if isinstance(values, dict) and isinstance(values.get(name), str) and values[name].strip():
                return str(values[name]).strip()
    for name in _LICENCE_FILES:
        file = folder / name
        if file.is_file():
            with open(file, encoding="utf-8", errors="replace") as handle:
                found = _LICENCE.search(handle.read(1 << 16))
            if found:
                return found[1].strip()
    return None
