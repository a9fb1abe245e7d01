"""The commands of the recommender wing: thin, everything heavy is imported when it is called."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.recsys import serve_cli
from kdcore import processes
from kdcore.command_line import Parser, example, integers, split_overrides, unknown_argument
from kdcore.config import UserError

if TYPE_CHECKING:
    from apps.recsys.pipeline import Pipeline

_STAGES = {
    "prepare": "read, check and split the data",
    "teach": "fit the teacher",
    "distill": "fit baselines, student alone and taught student",
    "evaluate": "measure every model on validation and test, and write the report",
    "run": "all of it: prepare, teach, distill, evaluate, report",
}


def main(words: Sequence[str]) -> int:
    """Run ``kd recsys`` with the given words."""
    parser = Parser(
        prog="kd recsys",
        description="Distil a top-N recommender's ranking into a compact student.",
        epilog=example(
            "kd recsys run --recipe relaxed_ranking --data ml-100k --seeds 0,1,2 --out runs/ml",
            "kd recsys recommend --run runs/ml --users all --k 10 --exclude-seen --out recs.parquet",
            "kd recsys serve --model exported --port 8000",
        ),
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, what in _STAGES.items():
        _add_stage(verbs, verb, what)
    _add_tune(verbs)
    _add_recommend(verbs)
    _add_export(verbs)
    serve_cli.add_serve(verbs)
    serve_cli.add_export_events(verbs)
    _add_bench(verbs)
    args, rest = parser.parse_known_args(words)
    known = verbs.choices[args.verb].options()
    if args.verb in _STAGES:
        with processes.first_process_speaks():
            return _stage(args, _overrides(rest, known))
    if args.verb == "tune":
        return _tune(args, _overrides(rest, known))
    if rest:
        raise unknown_argument(rest[0], known)
    commands = {
        "recommend": _recommend,
        "export": _export,
        "serve": serve_cli.serve,
        "export-events": serve_cli.export_events,
        "bench": _bench,
    }
    return commands[args.verb](args)


def _overrides(words: Sequence[str], known: Sequence[str]) -> list[tuple[str, str]]:
    """Return the settings that the words left over change; ``known`` are the command's options."""
    if not words:
        return []
    from apps.recsys.config import RecsysConfig

    return split_overrides(words, known, [each.name for each in fields(RecsysConfig)])


def describe_recipes() -> list[dict[str, str]]:
    """Return name, title and reference of every recipe."""
    from kdcore.recipes import Recipes

    return Recipes("apps.recsys").describe()


def _add_stage(verbs: Any, verb: str, what: str) -> None:
    parser = verbs.add_parser(
        verb,
        help=what,
        description=f"{what[0].upper()}{what[1:]}. Any setting of the recipe can be changed with --a or --a.b value.",
        epilog=example(
            f"kd recsys {verb} --recipe relaxed_ranking --data ml-100k --seeds 0,1,2 --out runs/ml",
            f"kd recsys {verb} --recipe relaxed_ranking --data log.csv --columns user_id=uid,item_id=sku,timestamp=ts "
            "--student.options.dimension 16",
        ),
    )
    _add_source(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_source(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--recipe", help="a recipe of `kd recipes`")
    source.add_argument("--config", type=Path, help="a YAML file of the same form")
    parser.add_argument("--data", help="a name (ml-100k), a file or a folder; `simulated` makes a data set")
    parser.add_argument("--columns", help="canonical=yours pairs, such as user_id=uid,item_id=sku,timestamp=ts")
    parser.add_argument("--skip-bad", action="store_true", help="drop and count rows that cannot be read")
    for part in ("train", "valid", "test"):
        parser.add_argument(f"--{part}", type=Path, help=f"your own {part} file (all three instead of --data)")
    parser.add_argument("--seeds", type=integers, help="one run a seed, such as 0,1,2")
    parser.add_argument("--out", type=Path, help="the run directory (default runs/RECIPE-DATA)")


def _add_tune(verbs: Any) -> None:
    parser = verbs.add_parser(
        "tune",
        help="search hyperparameters of student, student alone and baselines, with one budget",
        description="Search on validation with the first seed's split; writes OUT/tuned.yaml for `kd recsys run`.",
        epilog=example(
            "kd recsys tune --recipe relaxed_ranking --data ml-100k --trials 20 --out runs/tune",
            "kd recsys run --config runs/tune/tuned.yaml --seeds 0,1,2,3,4 --out runs/tuned",
        ),
    )
    _add_source(parser)
    parser.add_argument("--trials", type=int, default=20, help="trials for each of them (default 20)")


def _tune(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    from apps.recsys.tune import Tuner

    pipeline = _open(args, overrides)
    Tuner(pipeline.config, pipeline.run.path, args.trials, pipeline.announce).tune()
    print(pipeline.run.path / "tuned.yaml")
    return 0


def _settings(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the command's own options as overrides, before the explicit ones."""
    own: list[tuple[str, str]] = []
    if args.data:
        own.append(("data.path", json.dumps(args.data)))
    if args.columns:
        pairs = dict(pair.partition("=")[::2] for pair in args.columns.split(","))
        if not all(pairs.values()):
            raise UserError(f"--columns: got {args.columns!r}, wanted canonical=yours pairs joined by commas")
        own.append(("data.columns", json.dumps(pairs)))
    if args.skip_bad:
        own.append(("data.skip_bad", "true"))
    files = {part: getattr(args, part) for part in ("train", "valid", "test")}
    if any(files.values()):
        if args.data:
            raise UserError("--data: got your own --train, --valid and --test files as well; wanted one or the other")
        own.append(("split.kind", "files"))
        own += [(f"split.{part}_file", json.dumps(str(file))) for part, file in files.items() if file]
    if args.seeds:
        own.append(("seeds", json.dumps(args.seeds)))
    return own + overrides


def _data_path(name: str) -> str:
    """Return ``name``; the simulated default is made on first use, and a public data set not yet here is announced."""
    from apps.recsys.data.store import find_data
    from data_scripts import catalogue
    from data_scripts.simulate_interactions import simulate

    if name == "simulated" and not Path(name).exists():
        return str(simulate(Path("data/simulated"), progress=True))
    try:
        find_data(name)
    except UserError:
        if name in catalogue.names():
            raise UserError(f"--data: {name} is not here yet; get it with kd data prepare {name}") from None
        raise
    return name


def _open(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> Pipeline:
    from apps.recsys.config import load_config
    from apps.recsys.pipeline import Pipeline
    from kdcore.progress import Announcer

    announce = Announcer()
    if args.recipe is None and args.config is None:
        return Pipeline.reopen(_reopened(args, overrides), announce)
    config = load_config(recipe=args.recipe, file=args.config, overrides=_settings(args, overrides))
    if config.data.path:
        with processes.first_process_first():
            config = replace(config, data=replace(config.data, path=_data_path(config.data.path)))
    elif config.split.kind != "files":
        raise UserError("wanted --data NAME or PATH (or --train, --valid and --test files)")
    data = Path(config.data.path or config.split.train_file or "data").name.split(".")[0]
    return Pipeline(config, args.out or Path("runs") / f"{config.recipe}-{data}", announce)


def _reopened(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> Path:
    """Return the run to go on with; it keeps its settings, so none may be given."""
    if args.out is None:
        raise UserError("wanted --recipe NAME or --config FILE, or --out RUN of a run to go on with (see --help)")
    changed = [*(f"--{path}" for path, _ in _settings(args, overrides))]
    if changed and not Path(args.out).exists():
        raise UserError(f"{args.out}: no run is there to go on with; a new one wants --recipe NAME or --config FILE")
    if changed:
        raise UserError(f"{changed[0]}: wanted --recipe or --config with it; without, {args.out} keeps its settings")
    return Path(args.out)


def _stage(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    pipeline = _open(args, overrides)
    dataset = pipeline.prepare()
    if args.verb == "prepare":
        for seed in pipeline.config.seeds:
            pipeline.split(seed)
        _print_statistics(dataset, args.json)
        return 0
    for seed in pipeline.config.seeds:
        if args.verb in ("teach", "distill", "run"):
            pipeline.teach(seed)
        if args.verb in ("distill", "run"):
            pipeline.distill(seed)
    if args.verb in ("evaluate", "run"):
        _finish(pipeline, args.json)
    else:
        print(json.dumps({"run": str(pipeline.run.path)}) if args.json else pipeline.run.path)
    return 0


def _print_statistics(dataset: Any, as_json: bool) -> None:
    from rich.console import Console

    from apps.recsys.data.dataset import statistics_table

    if as_json:
        print(json.dumps(dataset.statistics(), indent=2, default=str))
    else:
        Console().print(statistics_table(dataset))


def _finish(pipeline: Pipeline, as_json: bool) -> None:
    """Evaluate, deploy the best seed, write the report, and print the table."""
    from rich.console import Console

    from kdcore.report import read_run, run_table, write_report
    from kdcore.run import read_json

    rows = pipeline.evaluate()
    pipeline.deploy()
    if not processes.is_first_process():
        return
    report = write_report(pipeline.run.path)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    Console().print(run_table(read_run(pipeline.run.path)))
    if read_json(pipeline.run.path / "provenance.json").get("simulated"):
        print("these figures are on simulated data")
    print(f"report: {report}")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, required=True, help="a finished run directory")
    parser.add_argument(
        "--model",
        choices=("student", "teacher", "student_alone"),
        default="student",
        help="which of its models (default student)",
    )


def _add_recommend(verbs: Any) -> None:
    parser = verbs.add_parser(
        "recommend",
        help="write top-k lists for some or all users",
        epilog=example("kd recsys recommend --run runs/ml --users all --k 10 --exclude-seen --out recs.parquet"),
    )
    _add_run(parser)
    parser.add_argument("--users", default="all", help="all, or a file: one user id a line, or CSV, TSV or Parquet")
    parser.add_argument("--k", type=int, default=10, help="items a user (default 10)")
    parser.add_argument("--exclude-seen", action="store_true", help="leave out what the user interacted with")
    parser.add_argument("--out", type=Path, required=True, help="Parquet: user_id, item_id, rank, score")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON")


def _recommend(args: argparse.Namespace) -> int:
    from apps.recsys.recommend import recommend

    summary = recommend(args.run, args.model, args.users, args.k, args.exclude_seen, args.out)
    if summary["repeated_users"]:
        print(f"{args.users}: {summary['repeated_users']} repeated users left out", file=sys.stderr)
    print(json.dumps(summary) if args.json else f"{summary['rows']} rows for {summary['users']} users: {args.out}")
    return 0


def _add_export(verbs: Any) -> None:
    parser = verbs.add_parser(
        "export",
        help="write a model for serving without torch: safetensors, JSON and ONNX",
        epilog=example("kd recsys export --run runs/ml --out exported"),
    )
    _add_run(parser)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; an earlier export is replaced")
    parser.add_argument("--json", action="store_true", help="print the model's name, version and parity as JSON")


def _export(args: argparse.Namespace) -> int:
    from apps.recsys.export import export
    from kdcore.run import read_json

    folder = export(args.run, args.model, args.out)
    if args.json:
        about = read_json(folder / "model.json")
        print(json.dumps({"out": str(folder), **{name: about[name] for name in ("label", "model_version", "parity")}}))
    else:
        print(folder)
    return 0


def _add_bench(verbs: Any) -> None:
    parser = verbs.add_parser(
        "bench",
        help="measure: quality, beauty, train, teachers, evaluate, serve",
        epilog=example(
            "kd recsys bench quality --json benchmarks/results/recsys_quality.json",
            "kd recsys bench serve --quick --only throughput,latency",
        ),
    )
    whats = ("quality", "beauty", "train", "teachers", "evaluate", "serve")
    parser.add_argument("what", choices=whats, help="which benchmark")
    parser.add_argument(
        "--json", type=Path, nargs="?", metavar="FILE", help="print the result as JSON; with a file, write it there too"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/bench"), help="where its runs go; resumable")
    parser.add_argument("--quick", action="store_true", help="serve: small and short, to see that it works")
    parser.add_argument("--only", default="", help="serve: some of its parts, joined by commas")


def _bench(args: argparse.Namespace) -> int:
    from apps.recsys.bench import run_bench

    only = [name for name in args.only.split(",") if name]
    return run_bench(args.what, args.json, args.work, quick=args.quick, only=only)


def demo(folder: Path) -> None:
    """Simulate a log, distil, evaluate, export and recommend; at most a few minutes on two cores, offline."""
    from rich.console import Console

    from apps.recsys.demo import show_recommendations
    from apps.recsys.export import export
    from data_scripts.simulate_interactions import simulate

    console = Console()
    data = folder.parent / "recsys-data"
    if not (data / "dataset.json").exists():
        simulate(data)
    words = ["--recipe", "relaxed_ranking", "--data", str(data), "--seeds", "0,1,2", "--out", str(folder)]
    main(["run", *words])
    exported = export(folder, "student", folder / "exported")
    console.print(f"student for serving: {exported}; try it with kd recsys serve --model {exported}")
    show_recommendations(folder, console)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
