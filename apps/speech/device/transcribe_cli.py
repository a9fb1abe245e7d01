"""The command ``kd speech transcribe``; everything heavy is imported when it is called."""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcore.command_line import EXIT_USAGE, example
from kdcore.config import UserError

if TYPE_CHECKING:
    from apps.speech.device.live import Form, Listening
    from apps.speech.device.transcribe import Item, Setup, Transcript
    from apps.speech.device.vad import GateOptions
    from apps.speech.runtime import Recognizer, Rule

VERB = "transcribe"
_ENDPOINT = "2.4,1.2,20"
_GATE = "4,1.6"
# samples between two updates of what is shown
_BLOCK_SECONDS = 1.0


def add_transcribe(verbs: Any) -> None:
    """Add ``transcribe``."""
    parser = verbs.add_parser(
        VERB,
        help="write down what is said in files, a manifest or live audio, with an exported student",
        description="Write down what is said, with the folder that `kd speech export` wrote. Words appear as they are "
        "said; a terminal shows what may still change.",
        epilog=example(
            "kd speech transcribe --model exported talk.flac",
            "kd speech transcribe --model exported --json --jobs 2 --out texts.jsonl --manifest calls.jsonl",
            "kd speech transcribe --model exported --srt lecture.mp3 > lecture.srt",
            'kd speech transcribe --model exported --mic --hot-word "kd suite=4"',
            "arecord -t raw -f S16_LE -r 48000 | kd speech transcribe --model exported --stdin-pcm --rate 48000",
        ),
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="audio of any rate, width and number of channels")
    parser.add_argument("--model", type=Path, required=True, help="the exported folder")
    parser.add_argument("--manifest", type=Path, help="JSON lines with audio_filepath (and offset, duration, channel)")
    parser.add_argument("--mic", action="store_true", help="listen to the microphone until Ctrl-C")
    parser.add_argument("--device", help="number or name of the microphone (default the system's)")
    parser.add_argument("--stdin-pcm", action="store_true", help="raw 16-bit little-endian samples on stdin")
    parser.add_argument("--rate", type=int, help="samples a second of --stdin-pcm (default 16000)")
    parser.add_argument("--channels", type=int, help="channels of --stdin-pcm; their mean is heard (default 1)")
    parser.add_argument("--channel", help="a channel from 0 (default the mean of all)")
    _add_output(parser)
    add_decoding(parser)


def _add_output(parser: Any) -> None:
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a JSON line a file (live: a segment), with words and times")
    form.add_argument("--srt", action="store_true", help="SubRip subtitles")
    form.add_argument("--vtt", action="store_true", help="WebVTT subtitles")
    form.add_argument("--timestamps", action="store_true", help="a line a segment, with its times")
    form.add_argument("--paragraphs", action="store_true", help="text in paragraphs, parted by pauses of 2 s")
    parser.add_argument(
        "--out",
        type=Path,
        help="a file of JSON lines, or of subtitles (a folder, for several files or without .srt and .vtt), instead "
        "of stdout; an interrupted batch goes on from what is there",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes that work on files (default 1)")
    parser.add_argument("--skip-bad", action="store_true", help="exit with 0 although files could not be read")


def add_decoding(parser: Any) -> None:
    """Add the options that say how an exported student decodes."""
    parser.add_argument(
        "--beam", type=int, default=1, help="prefixes kept (default: best path; 16 with the options below)"
    )
    parser.add_argument(
        "--hot-word",
        action="append",
        default=[],
        metavar="PHRASE=BOOST",
        help="prefer a phrase; boosts of 2 to 8 are usual; may be repeated",
    )
    parser.add_argument("--grammar", type=Path, help="a file with the only words there are, one a line")
    parser.add_argument("--lm", type=Path, help="an n-gram language model (ARPA), such as `kd speech lm` writes")
    parser.add_argument("--lm-weight", type=float, help="its weight (default the export's, else 1)")
    parser.add_argument("--word-score", type=float, help="added for each word (default the export's, else 0)")
    parser.add_argument("--fp32", action="store_true", help="run the model with float32 weights instead of int8")
    parser.add_argument("--threads", type=int, default=1, help="threads of the network (default 1)")
    parser.add_argument(
        "--endpoint",
        default=_ENDPOINT,
        metavar="A,B,C",
        help="a segment ends after A s of silence at its start, B s after words, and at C s "
        "(a word that is begun then may end) "
        f"(default {_ENDPOINT})",
    )
    parser.add_argument(
        "--remove-offset",
        action="store_true",
        help="take a constant offset (DC) out of the audio before it is heard, as of hardware that adds one",
    )
    parser.add_argument("--gate", action="store_true", help="do not run the network where nobody speaks")
    parser.add_argument(
        "--gate-rule",
        metavar="DB,SECONDS",
        help=f"--gate, with how far speech is above the noise in a band, and the quiet behind it (default {_GATE})",
    )


def run_transcribe(args: argparse.Namespace) -> int:
    """Transcribe; return the exit code: 0, or 2 where something could not be read and --skip-bad is not given.

    Raises:
        UserError: what is wrong with options, model or manifest, without control characters.
    """
    from apps.speech.device.live import printable

    if isinstance(sys.stdout, io.TextIOWrapper):  # JSON and subtitles are UTF-8; what else cannot be shown is escaped
        sys.stdout.reconfigure(encoding="utf-8" if args.json or _suffix(args) else None, errors="backslashreplace")
    try:
        return _run(args)
    except UserError as error:
        raise UserError(printable(" ".join(str(error).split()))) from None


def _run(args: argparse.Namespace) -> int:
    sources = [bool(args.files), args.manifest is not None, args.mic, args.stdin_pcm]
    if sum(sources) != 1:
        raise UserError("wanted one of FILE..., --manifest, --mic and --stdin-pcm (see --help)")
    if args.jobs < 1:
        raise UserError(f"--jobs: got {args.jobs}, wanted 1 or more")
    if args.device is not None and not args.mic:
        raise UserError("--device: wanted --mic with it")
    for name in ("rate", "channels"):
        if getattr(args, name) is not None and not args.stdin_pcm:
            raise UserError(f"--{name}: wanted --stdin-pcm with it; files and microphones say it themselves")
    setup = setup_of(args)
    if args.mic or args.stdin_pcm:
        return _live(args, setup)
    alone = args.manifest is None and len(args.files) == 1 and not args.json
    if alone and (not args.out or (_suffix(args) and _is_subtitle_file(args.out, _suffix(args)))):
        return _one(args, setup)
    return _batch(args, setup)


def _is_subtitle_file(out: Path, wanted: str) -> bool:
    """Return whether --out names a file of subtitles, not the folder of several; UserError for the other kind's."""
    named = out.suffix.lower()
    if named not in (".srt", ".vtt") or out.is_dir():
        return False
    if named != wanted:
        raise UserError(
            f"--out: {out} is named for other subtitles, wanted {out.with_suffix(wanted).name} of --{wanted[1:]}"
        )
    return True


def setup_of(args: argparse.Namespace) -> Setup:
    """Return what the options ``--model`` and those of ``add_decoding`` ask for."""
    from apps.speech.device.decoding import Decoding, read_grammar
    from apps.speech.device.folder import ExportedFolder
    from apps.speech.device.spelling import Symbols
    from apps.speech.device.transcribe import Setup

    if args.lm_weight is not None and not args.lm:
        raise UserError("--lm-weight: wanted --lm with it")
    if args.word_score is not None and not (args.lm or args.grammar):
        raise UserError("--word-score: wanted --lm or --grammar with it")
    folder = ExportedFolder.open(args.model)
    known = folder.decode if args.lm else {}  # it was chosen with a language model
    decoding = Decoding(
        beam=args.beam,
        hot_words=dict(_hot_word(text) for text in args.hot_word),
        grammar=read_grammar(args.grammar, Symbols(folder.symbols, folder.text)) if args.grammar else (),
        lm=args.lm,
        lm_weight=_given(args.lm_weight, known.get("lm_weight"), 1.0),
        word_score=_given(args.word_score, known.get("word_score"), 0.0),
    )
    gate = _gate(args.gate_rule or _GATE) if args.gate or args.gate_rule else None
    endpoint, model = _rules(args.endpoint), os.fspath(args.model)
    return Setup(model, not args.fp32, args.threads, decoding, endpoint, gate, args.remove_offset)


def _given(asked: float | None, exported: Any, otherwise: float) -> float:
    """Return what was asked for, else what the export recommends."""
    if asked is not None:
        return asked
    return float(exported) if isinstance(exported, int | float) else otherwise


def _hot_word(text: str) -> tuple[str, float]:
    phrase, equals, boost = text.rpartition("=")
    try:
        number = float(boost)
    except ValueError:
        number = math.nan
    if not equals or not phrase.strip() or not math.isfinite(number):
        raise UserError(f'--hot-word: got {text!r}, wanted PHRASE=BOOST, such as "kd suite=4"')
    if any("\ud800" <= symbol <= "\udfff" for symbol in phrase):
        raise UserError(f"--hot-word: got {text!a}, which cannot be written as text")
    return phrase, number


def _rules(text: str) -> tuple[Rule, ...]:
    from apps.speech.runtime import Rule

    try:
        nothing, pause, longest = (float(part) for part in text.split(","))
        if any(map(math.isnan, (nothing, pause, longest))):
            raise ValueError
    except ValueError:
        raise UserError(f"--endpoint: got {text!r}, wanted three numbers of seconds such as {_ENDPOINT}") from None
    return Rule(False, nothing, 0.0), Rule(True, pause, 0.0), Rule(False, 0.0, longest)


def _gate(text: str) -> GateOptions:
    from apps.speech.device.vad import GateOptions

    try:
        rise, hold = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--gate-rule: got {text!r}, wanted decibels and seconds such as {_GATE}") from None
    return GateOptions(rise=rise, hold=hold)


def _channel(args: argparse.Namespace) -> int | str:
    if args.channel is None:
        return "mix"
    if not args.channel.isascii() or not args.channel.isdigit():
        raise UserError(f"--channel: got {args.channel!r}, wanted a number from 0")
    return int(args.channel)


def _suffix(args: argparse.Namespace) -> str:
    return ".srt" if args.srt else ".vtt" if args.vtt else ""


def _recognizer(setup: Setup) -> Recognizer:
    recognizer = setup.recognizer()
    if left_out := recognizer.decoder.left_out:
        shown = ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else "")
        print(
            f"kd: {setup.decoding.lm}: {len(left_out)} words that cannot be spelled are left out: {shown}",
            file=sys.stderr,
        )
    return recognizer


def _form(args: argparse.Namespace) -> Form:
    """Return how updates are written; the live form of --json is a line a segment."""
    from apps.speech.device import live

    forms = {"json": live.as_json, "srt": live.as_srt, "vtt": live.as_vtt}
    forms |= {"timestamps": live.as_timed_lines, "paragraphs": live.as_paragraphs}
    return next((form for name, form in forms.items() if getattr(args, name)), live.as_lines)


def _one(args: argparse.Namespace, setup: Setup) -> int:
    """Transcribe one file as its words come."""
    from apps.speech.audio import blocks
    from apps.speech.device.live import Listening, write
    from kdcore.run import atomic_path

    listening = Listening(_recognizer(setup), blocks(args.files[0], _BLOCK_SECONDS, channel=_channel(args)))
    if not args.out:
        write(listening, _form(args), sys.stdout)
    else:
        try:
            with atomic_path(args.out) as path, open(path, "w", encoding="utf-8") as handle:
                write(listening, _form(args), handle)
                if listening.problem:
                    raise listening.problem  # subtitles of a part are not left in the place of the whole's
        except UserError as error:
            if error is not listening.problem:
                raise
    return _ended(listening, args.files[0], args.skip_bad)


def _live(args: argparse.Namespace, setup: Setup) -> int:
    from apps.speech.device.live import Listening, interrupt_stops, write
    from apps.speech.device.microphone import microphone
    from apps.speech.device.transcribe import pcm_blocks

    for name in ("out", "channel"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name}: is for files; live audio is printed as it comes")
    if args.skip_bad or args.jobs > 1:
        raise UserError(f"--{'skip-bad' if args.skip_bad else 'jobs'}: is for files, not for live audio")
    if args.stdin_pcm and sys.stdin is None:
        raise UserError("--stdin-pcm: standard input is closed; wanted raw samples there")
    is_number = args.device is not None and args.device.isascii() and args.device.isdigit()
    device = int(args.device) if is_number else args.device
    given = {name: value for name in ("rate", "channels") if (value := getattr(args, name)) is not None}
    source = microphone(device) if args.mic else pcm_blocks(sys.stdin.buffer, **given)
    listening = Listening(_recognizer(setup), source)
    with interrupt_stops(listening):
        write(listening, _form(args), sys.stdout)
    return _ended(listening, "microphone" if args.mic else "standard input", False)


def _ended(listening: Listening, name: str, skip_bad: bool) -> int:
    """Say what is wrong with an input that was heard as it came, and return the exit code."""
    if listening.problem is None:
        _remark(name, listening.remarks)
    return _reported(listening.problem, skip_bad)


def _remark(name: str, remarks: Sequence[str]) -> None:
    """Say in one line what is wrong with audio that could be heard."""
    from apps.speech.device.live import printable

    if remarks:
        print(f"kd: {printable(name)}: {'; '.join(remarks)}", file=sys.stderr)


def _reported(problem: UserError | None, skip_bad: bool) -> int:
    """Say what is wrong with an input, in one line, and return the exit code."""
    if problem is None:
        return 0
    from apps.speech.device.live import printable

    print(f"kd: error: {printable(' '.join(str(problem).split()))}", file=sys.stderr)
    return 0 if skip_bad else EXIT_USAGE


def _batch(args: argparse.Namespace, setup: Setup) -> int:
    """Transcribe files or a manifest; each result is written when those before it are."""
    from apps.speech.device.transcribe import Item, manifest_items

    if args.manifest:
        if args.channel is not None:
            raise UserError("--channel: is for files; a manifest has its own")
        found: list[Item | UserError] = list(manifest_items(args.manifest))
        if not found:
            raise UserError(f"{args.manifest}: holds no row; wanted JSON lines with audio_filepath")
    else:
        channel = _channel(args)
        found = [Item(name, name, channel=channel) for name in dict.fromkeys(args.files)]
    bad = sum(_reported(each, False) > 0 for each in found if isinstance(each, UserError))
    items = [each for each in found if not isinstance(each, UserError)]
    if _suffix(args):
        bad += _subtitles(args, setup, items)
    elif args.out:
        bad += _to_file(args, setup, items)
    else:
        for result in _results(args, setup, items):
            if isinstance(result, UserError):
                bad += _reported(result, False) > 0
            else:
                _print(args, result)
    if bad and len(found) > 1:
        print(f"kd: {bad} of {len(found)} could not be transcribed", file=sys.stderr)
    return EXIT_USAGE if bad and not args.skip_bad else 0


def _results(args: argparse.Namespace, setup: Setup, items: Sequence[Item]) -> Iterator[Transcript | UserError]:
    """Yield the results in order; a bar on stderr where they do not go to the same terminal."""
    from apps.speech.device.transcribe import transcribe_all

    results = transcribe_all(setup, items, args.jobs, _recognizer)
    if len(items) < 2 or not sys.stderr.isatty() or (sys.stdout.isatty() and not args.out):
        yield from results
        return
    from rich.progress import track

    from kdcore.progress import stderr_console

    yield from track(results, "transcribing", total=len(items), console=stderr_console(), transient=True)


def _print(args: argparse.Namespace, transcript: Transcript) -> None:
    from apps.speech.device.live import json_line, printable, timed_line
    from apps.speech.device.subtitles import paragraphs

    name = printable(transcript.item.audio)
    if args.json:
        text = json_line(transcript.row())
    elif args.timestamps:
        text = "".join([f"{name}:\n", *map(timed_line, transcript.segments)])
    elif args.paragraphs:
        passages = [" ".join(word["word"] for word in words) for words in paragraphs(transcript.words)]
        text = f"{name}:\n" + "\n\n".join(passages) + "\n"
    else:
        text = f"{name}: {transcript.text}\n"
    sys.stdout.write(text)
    sys.stdout.flush()
    if not args.json:  # whose row has them
        _remark(transcript.item.audio, transcript.remarks)


def _to_file(args: argparse.Namespace, setup: Setup, items: Sequence[Item]) -> int:
    """Write JSON lines, those that are there already left out; return how many pieces are bad."""
    from apps.speech.device.outputs import Output

    if args.timestamps or args.paragraphs:
        raise UserError("--out: holds JSON lines (or subtitles, with --srt or --vtt), which have the times")
    output = Output(args.out, setup.about())
    bad = 0
    try:
        for result in _results(args, setup, output.missing(items)):
            if isinstance(result, UserError):
                bad += _reported(result, False) > 0
            else:
                output.write(result)
    finally:
        output.close()
    return bad


def _subtitles(args: argparse.Namespace, setup: Setup, items: Sequence[Item]) -> int:
    """Write a file of subtitles for each piece, those that are there already left out; return how many are bad."""
    from apps.speech.device.outputs import check_settings, subtitle_paths, subtitles_begun
    from apps.speech.device.subtitles import cues, srt, vtt
    from kdcore.run import write_text

    if not args.out:
        raise UserError(f"--{_suffix(args)[1:]}: wanted --out FOLDER with it for several files")
    paths, clashing = subtitle_paths(items, args.out, _suffix(args))
    check_settings(args.out, setup.about(), begun=subtitles_begun(args.out, paths.values()))
    bad = sum(_reported(each, False) > 0 for each in clashing)
    waiting = [item for item, path in paths.items() if not path.exists()]
    for result in _results(args, setup, waiting):
        if isinstance(result, UserError):
            bad += _reported(result, False) > 0
        else:
            write_text(paths[result.item], "".join((srt if args.srt else vtt)(cues(result.words))))
            _remark(result.item.audio, result.remarks)
    return bad
