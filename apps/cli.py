"""The one command: ``kd``. Wings are imported only when they are called, so help is instant."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from kdcore import __version__
from kdcore.command_line import Parser, example, guarded

# wing -> what it does; each has a module apps.<wing>.cli with main(words) and demo(folder)
WINGS = {
    "recsys": "distil a top-N recommender and write its recommendations",
    "speech": "distil a CTC recogniser into a compact streaming student",
}


# what `kd NAME` lists of the core
CATALOGUES = {"losses": "the losses of the core", "teaching": "the ways of teaching of the core"}


def main(words: Sequence[str] | None = None) -> int:
    """Run ``kd`` with the given words (default: the command line) and return the exit code."""
    given = list(sys.argv[1:] if words is None else words)
    return guarded(lambda: _main(given))


def _main(words: list[str]) -> int:
    if words and words[0] in WINGS:
        return int(import_module(f"apps.{words[0]}.cli").main(words[1:]))
    if words and words[0] == "bench":
        return int(import_module("apps.bench.cli").main(words[1:]))
    parser = Parser(
        prog="kd",
        description="kdsuite: big models teach small ones, and the small ones go to work.",
        epilog=example("kd demo", "kd recsys run --recipe relaxed_ranking --data ml-100k --seeds 0,1,2"),
    )
    parser.add_argument("--version", action="version", version=f"kdsuite {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="run every wing (or one) on simulated data, in minutes, offline",
        epilog=example("kd demo", "kd demo recsys --out runs/demo"),
    )
    demo.add_argument("wing", nargs="?", choices=sorted(WINGS), help="only this wing")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="where runs go (default runs/demo)")
    recipes = commands.add_parser(
        "recipes", help="list the recipes of every wing", epilog=example("kd recipes", "kd recipes --domain speech")
    )
    recipes.add_argument("--domain", choices=sorted(WINGS), metavar="NAME", help=f"only of {' or '.join(WINGS)}")
    recipes.add_argument("--json", action="store_true", help="print JSON")
    _add_data(commands)
    for catalogue, what in CATALOGUES.items():
        listing = commands.add_parser(catalogue, help=f"list {what}", epilog=example(f"kd {catalogue} --json"))
        listing.add_argument("--json", action="store_true", help="print JSON")
    commands.add_parser("bench", help="measure the core on this machine", add_help=False)
    report = commands.add_parser(
        "report", help="write a run's report and print its table", epilog=example("kd report runs/demo/recsys")
    )
    report.add_argument("run", type=Path, help="the run directory")
    for wing, what in WINGS.items():
        commands.add_parser(wing, help=what, add_help=False)
    args = parser.parse_args(words)
    if args.command in CATALOGUES:
        return _catalogue(args)
    return {"demo": _demo, "recipes": _recipes, "data": _data, "report": _report}[args.command](args)


def _add_data(commands: Any) -> None:
    data = commands.add_parser(
        "data",
        help="list public data sets, prepare one, or simulate one",
        epilog=example(
            "kd data list",
            "kd data prepare ml-1m",
            "kd data prepare ml-1m --from ml-1m.zip",
            "kd data simulate speech --utterances 2000 --out data/spoken",
        ),
    )
    verbs = data.add_subparsers(dest="verb", metavar="VERB", required=True)
    listing = verbs.add_parser("list", help="names, sizes and licences", epilog=example("kd data list"))
    listing.add_argument("--json", action="store_true", help="print JSON")
    prepare = verbs.add_parser(
        "prepare",
        help="download (or take from --from), verify and convert to canonical Parquet",
        epilog=example("kd data prepare ml-1m", "kd data prepare ml-1m --from ~/ml-1m.zip --out data/ml-1m"),
    )
    prepare.add_argument("name", help="a name of `kd data list`")
    prepare.add_argument("--from", dest="source", type=Path, help="a local archive or folder instead of the network")
    prepare.add_argument("--out", type=Path, help="the canonical folder (default data/NAME)")
    simulate = verbs.add_parser(
        "simulate",
        help="make a data set of any size, offline",
        epilog=example(
            "kd data simulate speech --utterances 2000 --out data/spoken",
            "kd data simulate interactions --users 10000 --out data/clicks",
        ),
    )
    _add_simulations(simulate.add_subparsers(dest="what", metavar="WHAT", required=True))


def _add_simulations(whats: Any) -> None:
    speech = whats.add_parser(
        "speech",
        help="recordings of 90 synthetic voices, with manifests",
        epilog=example(
            "kd data simulate speech --utterances 2000 --seed 1 --out data/spoken",
            "kd data simulate speech --snr -5 10 --out data/noisy",
            "kd data simulate speech --texts sentences.txt --silence 0 0.1 --out data/mine",
        ),
    )
    speech.add_argument("--utterances", type=int, metavar="N", help="a tenth each validates and tests (default 600)")
    noise = speech.add_mutually_exclusive_group()
    _add_range(noise, "--snr", "dB; each utterance has a signal-to-noise ratio between them (default 10 30)")
    noise.add_argument("--no-noise", action="store_true", help="add no noise")
    _add_range(speech, "--silence", "seconds before and behind the speech, between them (default 0.1 0.5)")
    speech.add_argument(
        "--texts", type=Path, metavar="FILE", help="a file of sentences, one a line, to be spoken (default a grammar's)"
    )
    interactions = whats.add_parser(
        "interactions",
        help="clicks of users on items",
        epilog=example("kd data simulate interactions --users 10000 --items 3000 --out data/clicks"),
    )
    interactions.add_argument("--users", type=int, metavar="N", help="how many (default 2000)")
    interactions.add_argument("--items", type=int, metavar="N", help="how many (default 1000)")
    for each in (speech, interactions):
        each.add_argument("--seed", type=int, metavar="N", help="the same one gives the same data (default 0)")
        each.add_argument("--out", type=Path, required=True, help="the folder to write; a data set there is replaced")


def _add_range(parser: Any, name: str, what: str) -> None:
    parser.add_argument(name, type=float, nargs=2, metavar=("LOW", "HIGH"), help=what)


def _demo(args: argparse.Namespace) -> int:
    wings = [args.wing] if args.wing else list(WINGS)
    for wing in wings:
        import_module(f"apps.{wing}.cli").demo(args.out / wing)
    return 0


def _recipes(args: argparse.Namespace) -> int:
    wings = [args.domain] if args.domain else list(WINGS)
    rows = [
        {"wing": wing, **recipe} for wing in wings for recipe in import_module(f"apps.{wing}.cli").describe_recipes()
    ]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("wing", box=None)
    table.add_column("recipe", no_wrap=True)  # a name that is cut off cannot be typed
    table.add_column("what")
    table.add_column("reference")
    for row in rows:
        table.add_row(row["wing"], row["recipe"], row["title"], row["reference"])
    Console().print(table)
    return 0


def _catalogue(args: argparse.Namespace) -> int:
    if args.command == "losses":
        rows = [row.describe() for row in import_module("kdcore.losses").entries()]
    else:
        rows = [row.describe() for row in import_module("kdcore.teaching").teaching_entries()]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "form", "what", "needs", "reference", box=None)
    table.columns[0].no_wrap = True
    for row in rows:
        needs = row["needs"] if isinstance(row["needs"], str) else ", ".join(row["needs"])
        table.add_row(row["name"], row.get("family", "") or row["form"], row["summary"], needs, row["reference"])
    Console().print(table)
    return 0


def _data(args: argparse.Namespace) -> int:
    if args.verb == "simulate":
        print(_SIMULATIONS[args.what](args))
        return 0
    from data_scripts import catalogue

    if args.verb == "list":
        return catalogue.print_list(as_json=args.json)
    name, out = args.name, args.out
    folder = catalogue.prepare(name, out or Path("data") / catalogue.folder_name(name), source=args.source)
    print(folder)
    return 0


def _simulate_speech(args: argparse.Namespace) -> Path:
    from data_scripts.simulate_speech import simulate

    given: dict[str, Any] = {"utterances": args.utterances, "seed": args.seed, "snr": args.snr and tuple(args.snr)}
    given |= {"silence": args.silence and tuple(args.silence)}
    if args.texts is not None:
        from apps.speech.decode.ngram import read_sentences

        given["texts"] = [line for line in read_sentences(args.texts) if line.strip()]
    given = {name: value for name, value in given.items() if value is not None}
    if args.no_noise:
        given["snr"] = None
    return simulate(args.out, progress=True, **given)


def _simulate_interactions(args: argparse.Namespace) -> Path:
    from data_scripts.simulate_interactions import simulate

    given = {"n_users": args.users, "n_items": args.items, "seed": args.seed}
    return simulate(args.out, progress=True, **{name: value for name, value in given.items() if value is not None})


_SIMULATIONS = {"speech": _simulate_speech, "interactions": _simulate_interactions}


def _report(args: argparse.Namespace) -> int:
    from rich.console import Console

    from kdcore.report import read_run, run_table, write_report

    path = write_report(args.run)
    Console().print(run_table(read_run(args.run)))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
