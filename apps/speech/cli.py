"""The commands of the speech wing: thin, everything heavy is imported when it is called."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.speech import serve_cli
from apps.speech.device import transcribe_cli
from kdcore import processes
from kdcore.command_line import Parser, example, integers, split_overrides, unknown_argument
from kdcore.config import UserError

if TYPE_CHECKING:
    from apps.speech.config import SpeechConfig
    from apps.speech.pipeline import Pipeline

_STAGES = {
    "prepare": "read and check the recordings, and compute their features",
    "teach": "fit the teacher",
    "distill": "fit the student alone and the taught student",
    "evaluate": "measure every model on validation and test, and write the report",
    "run": "all of it: prepare, teach, distill, evaluate, report",
}


def main(words: Sequence[str]) -> int:
    """Run ``kd speech`` with the given words."""
    parser = Parser(
        prog="kd speech",
        description="Distil a CTC recogniser at the sequence level into a compact streaming student.",
        epilog=example(
            "kd speech run --recipe ctc_sequence_level --data an4 --out runs/an4",
            "kd speech run     # small, quick, offline: simulated speech",
            "kd speech export --run runs/an4 --out exported",
            "kd speech transcribe --model exported talk.flac",
            "kd speech lm --text sentences.txt --order 3 --out lm.arpa",
        ),
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, what in _STAGES.items():
        _add_stage(verbs, verb, what)
    _add_export(verbs)
    transcribe_cli.add_transcribe(verbs)
    serve_cli.add_serve(verbs)
    _add_check(verbs)
    _add_shards(verbs)
    _add_lm(verbs)
    _add_bench(verbs)
    args, rest = parser.parse_known_args(words)
    known = verbs.choices[args.verb].options()
    if args.verb in _STAGES:
        with processes.first_process_speaks():
            return _stage(args, _overrides(rest, known))
    if rest:
        raise unknown_argument(rest[0], known)
    return _VERBS[args.verb](args)


def _overrides(words: Sequence[str], known: Sequence[str]) -> list[tuple[str, str]]:
    """Return the settings that the words left over change; ``known`` are the command's options."""
    if not words:
        return []
    from apps.speech.config import SpeechConfig

    return split_overrides(words, known, [each.name for each in fields(SpeechConfig)])


def describe_recipes() -> list[dict[str, str]]:
    """Return name, title and reference of every recipe."""
    from kdcore.recipes import Recipes

    return Recipes("apps.speech").describe()


def _add_stage(verbs: Any, verb: str, what: str) -> None:
    parser = verbs.add_parser(
        verb,
        help=what,
        description=f"{what[0].upper()}{what[1:]}. Any setting of the recipe can be changed with --a or --a.b value.",
        epilog=example(
            f"kd speech {verb} --recipe ctc_sequence_level --data an4 --seeds 0,1,2 --out runs/an4",
            f"kd speech {verb} --recipe clean_to_noisy --data my/manifest.jsonl --student.options.size tiny",
            f"kd speech {verb} --recipe ctc_sequence_level --data an4 fsdd@speaker!=george --test fsdd@speaker=george",
        ),
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--recipe", help="a recipe of `kd recipes`")
    source.add_argument("--config", type=Path, help="a YAML file of the same form")
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="CORPUS",
        help="a name (an4), a manifest, a folder of any known format or tar shards, or several of them; `simulated` "
        "makes a corpus; CORPUS@speaker=A,B takes these speakers only, CORPUS@speaker!=A all others, "
        "CORPUS@split=NAME a part (so with any field of its rows)",
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave out and count what cannot be read")
    for part in ("train", "valid", "test"):
        parser.add_argument(
            f"--{part}", nargs="+", metavar="CORPUS", help=f"the {part} part, instead of that of --data"
        )
    parser.add_argument(
        "--unlabelled",
        nargs="+",
        metavar="CORPUS",
        help="recordings without a text, on which the teacher alone teaches",
    )
    parser.add_argument("--seeds", type=integers, help="one run a seed, such as 0,1,2")
    parser.add_argument("--out", type=Path, help="the run directory (default runs/RECIPE-DATA)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _settings(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the command's own options as overrides, before the explicit ones."""
    own = []
    for name in ("data", "train", "valid", "test", "unlabelled"):
        given = getattr(args, name)
        if given:
            value = given if len(given) > 1 else given[0]
            own.append(("data.path" if name == "data" else f"data.{name}", json.dumps(value)))
    if args.skip_bad:
        own.append(("data.skip_bad", "true"))
    if args.seeds:
        own.append(("seeds", json.dumps(args.seeds)))
    return own + overrides


def _open(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> Pipeline:
    from apps.speech.config import load_config
    from apps.speech.pipeline import Pipeline
    from kdcore.progress import Announcer

    announce = Announcer()
    given = _settings(args, overrides)
    if args.recipe is None and args.config is None and args.out is None and not args.data:
        args.recipe, args.data = "demo", ["simulated"]  # what a fresh machine has
        given = _settings(args, overrides)
    if args.recipe is None and args.config is None:
        if args.out is None:
            raise UserError("wanted --recipe NAME or --config FILE, or --out RUN of a run to go on with (see --help)")
        if given:
            raise UserError(
                f"--{given[0][0]}: wanted --recipe or --config with it; without, {args.out} keeps its settings"
            )
        return Pipeline.reopen(args.out, announce)
    config = load_config(recipe=args.recipe, file=args.config, overrides=given)
    if "simulated" in (args.data or ()) and not Path("simulated").exists():
        from apps.speech.checks import check_config
        from data_scripts.simulate_speech import simulate

        check_config(config)  # a setting that cannot work is refused before a corpus is made for it
        with processes.first_process_first():
            made = str(simulate(Path("data/simulated-speech"), progress=True))
        args.data = [made if each == "simulated" else each for each in args.data]
        config = load_config(recipe=args.recipe, file=args.config, overrides=_settings(args, overrides))
    if not (config.data.path or config.data.train):
        raise UserError("wanted --data NAME or PATH, or --train and --test")
    config = _from_anywhere(config)
    return Pipeline(config, args.out or Path("runs") / f"{config.recipe}-{config.data.name}", announce)


def _from_anywhere(config: SpeechConfig) -> SpeechConfig:
    """Return the same configuration, its files and folders named so that any folder is one to go on from."""
    from apps.speech.data.corpora import absolute_name
    from apps.speech.views import parse_view

    def placed(folder: str) -> str:
        # what is not there stays as it is written, and is named so by who misses it
        return os.path.abspath(folder) if folder and os.path.exists(folder) else folder

    parsed = {view: parse_view(view) for view in config.heard_views}
    heard = {name: view.from_anywhere().name if view.folders else name for name, view in parsed.items()}
    named: dict[str, Any] = {}
    for name in ("path", "train", "valid", "test", "unlabelled"):
        given = getattr(config.data, name)
        if given:
            named[name] = absolute_name(given) if isinstance(given, str) else [absolute_name(each) for each in given]
    members = [replace(member, path=placed(member.path)) for member in config.teacher.members]
    return replace(
        config,
        data=replace(config.data, **named),
        views=[replace(pair, student=heard[pair.student], teacher=heard[pair.teacher]) for pair in config.views],
        test_view=heard[config.test_view],
        teacher=replace(config.teacher, path=placed(config.teacher.path), members=members),
    )


def _stage(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    pipeline = _open(args, overrides)
    prepared = pipeline.prepared
    if args.verb == "prepare":
        _print_parts(prepared.statistics(), args.json)
        return 0
    for seed in pipeline.config.seeds:
        if args.verb in ("teach", "distill", "run"):
            pipeline.lecturer(seed)
        if args.verb in ("distill", "run"):
            pipeline.distill(seed)
    if args.verb in ("evaluate", "run"):
        _finish(pipeline, args.json)
    else:
        print(json.dumps({"run": str(pipeline.run.path)}) if args.json else pipeline.run.path)
    return 0


def _print_parts(rows: list[dict[str, Any]], as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(*rows[0], box=None)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)


def _finish(pipeline: Pipeline, as_json: bool) -> None:
    """Evaluate, deploy the best seed, write the report, and print the table and a transcript."""
    from rich.console import Console

    from apps.speech.measure import evaluate, shown_utterance
    from kdcore.report import read_run, run_table, write_report
    from kdcore.run import read_json

    rows = evaluate(pipeline, memory=True)
    pipeline.deploy()
    if not processes.is_first_process():
        return
    report = write_report(pipeline.run.path)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    console = Console()
    console.print(run_table(read_run(pipeline.run.path)))
    console.print(shown_utterance(pipeline), markup=False, highlight=False)
    if read_json(pipeline.run.path / "provenance.json").get("simulated"):
        print("these figures are on simulated data")
    print(f"report: {report}")


def _add_export(verbs: Any) -> None:
    parser = verbs.add_parser(
        "export",
        help="write the student of a finished run as a folder for our runtime and for sherpa-onnx",
        description="Write the deployed student of a run as ONNX, float32 and int8, proved equal to the model, with "
        "tokens, model card and a clip to test itself; sherpa-onnx reads the same folder.",
        epilog=example("kd speech export --run runs/an4 --out exported"),
    )
    parser.add_argument("--run", type=Path, required=True, help="a finished run")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; an earlier export is replaced")
    parser.add_argument(
        "--model", choices=("student", "student_alone"), default="student", help="which (default student)"
    )
    parser.add_argument("--name", help="of the model (default the run's)")
    parser.add_argument("--only", choices=("int8", "fp32"), help="keep that model file alone (default both)")
    parser.add_argument(
        "--chunk-ms",
        type=int,
        metavar="MS",
        help="what one step hears, a multiple of 40 (default as trained): short answers sooner, long costs less",
    )
    parser.add_argument("--licence", help="of the data, for the card (default what is stated beside it)")


def _export(args: argparse.Namespace) -> int:
    from apps.speech.export import export

    given = {name: getattr(args, name) for name in ("name", "licence", "only", "chunk_ms")}
    print(export(args.run, args.model, args.out, **given))
    return 0


def _add_check(verbs: Any) -> None:
    parser = verbs.add_parser(
        "check",
        help="verify an exported folder before it ships",
        description="Verify an exported folder: hashes, shapes, and that its clip is heard; exit code 1 if not.",
        epilog=example("kd speech check exported"),
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="what `kd speech export` wrote")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def _check(args: argparse.Namespace) -> int:
    from apps.speech.device.folder_check import check_folder

    findings = check_folder(args.folder)
    if args.json:
        print(json.dumps([vars(each) for each in findings], indent=2))
    else:
        for each in findings:
            detail = f": {each.detail}" if each.detail else ""
            print(f"{'ok  ' if each.ok else 'BAD '} {each.file}  {each.check}{detail}")
    return 0 if all(each.ok for each in findings) else 1


def _add_shards(verbs: Any) -> None:
    parser = verbs.add_parser(
        "shards",
        help="write a corpus as tar shards, which --data reads too",
        description="Write a corpus as tar shards (WebDataset's layout; audio as 16 kHz FLAC), for large corpora.",
        epilog=example(
            "kd speech shards --data an4@split=train --out shards/an4", "kd speech run ... --train shards/an4"
        ),
    )
    parser.add_argument("--data", required=True, nargs="+", metavar="CORPUS", help="as of `kd speech run`")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--per-shard", type=int, default=1000, help="utterances a shard (default 1000)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out and count what cannot be read")


def _shards(args: argparse.Namespace) -> int:
    from apps.speech.card import stated_licences
    from apps.speech.data.corpora import Sources
    from apps.speech.data.shards import INDEX, write_shards
    from kdcore.run import read_json

    if args.per_shard < 1:
        raise UserError(f"--per-shard: got {args.per_shard}, wanted at least 1")
    sources = Sources(skip_bad=args.skip_bad, several=len(args.data) > 1)
    corpus, licence = sources.whole(args.data), stated_licences(args.data)
    simulated = any(source.simulated for source in sources.sources.values())
    # what the recordings are stays with them
    about = {"simulated": simulated, **({"licence": licence} if licence else {})} if simulated or licence else None
    given: dict[str, Any] = {"per_shard": args.per_shard, "skip_bad": args.skip_bad, "about": about}
    for path in write_shards(corpus, args.out, **given):
        print(path)
    for reason, count in read_json(args.out / INDEX, dict)["left_out"].items():
        print(f"left out, {reason}: {count}", file=sys.stderr)
    return 0


def _add_lm(verbs: Any) -> None:
    parser = verbs.add_parser(
        "lm",
        help="count an n-gram language model from text, as an ARPA file",
        epilog=example("kd speech lm --text sentences.txt --order 3 --out lm.arpa"),
    )
    parser.add_argument("--text", type=Path, required=True, nargs="+", help="text, a sentence a line")
    parser.add_argument("--order", type=int, default=3, help="words of the longest n-gram, 2 to 6 (default 3)")
    parser.add_argument("--run", type=Path, help="a run, as whose transcripts texts are written (its data.text)")
    parser.add_argument("--out", type=Path, required=True, help="the ARPA file to write")


def _lm(args: argparse.Namespace) -> int:
    from apps.speech.decode.lm import MAX_ORDER, MIN_ORDER, marker_in
    from apps.speech.decode.ngram import read_sentences, write_arpa
    from apps.speech.text import TextRules

    if not MIN_ORDER <= args.order <= MAX_ORDER:
        raise UserError(f"--order: got {args.order}, wanted {MIN_ORDER} to {MAX_ORDER}")
    if args.run:
        from apps.speech.config import load_config

        rules = load_config(file=args.run / "config.yaml").data.text
    else:
        rules = TextRules()
    texts = []
    for file in args.text:
        for number, line in enumerate(read_sentences(file), start=1):
            text = rules.normalise(line)
            if marker := marker_in(text):
                raise UserError(f"{file}, line {number}: got {marker}, wanted words (a model has that by itself)")
            texts += [text] if text else []
    if not texts:
        raise UserError(f"{', '.join(map(str, args.text))}: no word to build a language model from")
    write_arpa(args.out, texts, args.order)
    print(args.out)
    return 0


def _add_bench(verbs: Any) -> None:
    parser = verbs.add_parser(
        "bench",
        help="measure: quality, train, digits, noise, runtime",
        epilog=example("kd speech bench quality --json benchmarks/results/speech_quality.json"),
    )
    parser.add_argument("what", choices=("quality", "train", "digits", "noise", "runtime"), help="which benchmark")
    parser.add_argument(
        "--json", type=Path, nargs="?", metavar="FILE", help="print the result as JSON; with a file, write it there too"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/bench"), help="where its runs go; resumable")
    parser.add_argument(
        "--only",
        default="",
        help="recipes of quality (ctc_sequence_level,ctc_frame_level unless given; there are ctc_segment_nbest and "
        "ctc_guided, too), or models of digits (teacher,student_alone,student unless given)",
    )


def _bench(args: argparse.Namespace) -> int:
    from apps.speech.bench import run_bench

    only = [name for name in args.only.split(",") if name]
    return run_bench(args.what, args.json, args.work, only, _simulated)


def _simulated(work: Path) -> list[Path]:
    """Return simulated speech for `bench digits`, made if it is not there: sentences, and digits by themselves.

    People's clips of digits begin and end with the word, and those of the other speakers are of few voices.
    """
    from apps.speech.bench_digits import WORDS
    from data_scripts.simulate_speech import simulate

    alone = work / "speech-simulated-digits"
    return [
        simulate(work / "speech-simulated", progress=True),
        simulate(alone, utterances=1200, texts=WORDS, silence=(0.0, 0.05), snr=(10.0, 40.0), progress=True),
    ]


def demo(folder: Path) -> None:
    """Simulate speech, distil, evaluate and transcribe a held-out file; a few minutes on two cores, offline."""
    from data_scripts.simulate_speech import simulate

    data = folder.parent / "speech-data"
    if not (data / "dataset.json").exists():
        simulate(data, progress=True)
    main(["run", "--recipe", "demo", "--data", str(data), "--out", str(folder)])


_VERBS = {
    "export": _export,
    "transcribe": transcribe_cli.run_transcribe,
    "serve": serve_cli.run_serve,
    "check": _check,
    "shards": _shards,
    "lm": _lm,
    "bench": _bench,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
