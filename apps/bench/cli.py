"""``kd bench``: measure the core on this machine."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

from kdcore.command_line import Parser, example
from kdcore.run import provenance, write_json

# what --json alone means
_STDOUT = Path("-")


def main(words: list[str]) -> int:
    """Run ``kd bench`` with the given words and return the exit code."""
    parser = Parser(
        prog="kd bench",
        description="Measure the core on this machine, beside the libraries people use now.",
        epilog=example("kd bench losses", "kd bench losses --json benchmarks/results/losses.json"),
    )
    parser.add_argument("what", choices=["losses"], help="losses: speed, memory and the teacher cache")
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=_STDOUT,
        metavar="FILE",
        help="print the result as JSON, and the tables on stderr; with a file, write it there instead",
    )
    parser.add_argument("--repeats", type=_at_least_15, default=21, help="timings of each, at least 15 (default 21)")
    return bench(parser.parse_args(words))


def _at_least_15(text: str) -> int:
    if not text.isdigit() or int(text) < 15:
        raise argparse.ArgumentTypeError(f"wanted a whole number of at least 15, got {text!r}")
    return int(text)


def bench(args: argparse.Namespace) -> int:
    """Measure, print the tables, and write the JSON if asked."""
    from rich.console import Console

    from apps.bench.losses import measure
    from apps.bench.memory import in_a_process

    result: dict[str, Any] = {"benchmark": "losses", "speed": measure(args.repeats)}
    file = None if args.json == _STDOUT else args.json
    console = Console(stderr=args.json == _STDOUT)
    _print_speed(result["speed"], console)
    for name in ("imports", "relations", "top_cache", "full_cache"):
        try:
            result[name] = in_a_process(name)
        except subprocess.CalledProcessError as error:
            result[name] = {"skipped": error.stderr.strip().splitlines()[-1]}
        console.print(f"{name}: {json.dumps(result[name])}", highlight=False, soft_wrap=True)
    result["provenance"] = provenance(command=["kd", "bench", "losses", *(["--json", str(file)] if file else [])])
    if file:
        write_json(file, result)
    elif args.json:
        print(json.dumps(result, indent=2))
    return 0


def _print_speed(speed: dict[str, Any], console: Any) -> None:
    from rich.table import Table

    peers = sorted({name for row in speed["rows"] for name in row["ms"]} - {"kdsuite"})
    table = Table("loss", "kdsuite ms", *(f"{peer} ms" for peer in peers), "ratio", "wanted", box=None)
    for row in speed["rows"]:
        times = [f"{row['ms'][name]:.2f}" if name in row["ms"] else "-" for name in ("kdsuite", *peers)]
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        table.add_row(row["loss"], *times, ratio, f"<= {row['target']}")
    console.print(table)
    for peer, why in speed["skipped"].items():
        console.print(f"{peer}: skipped, {why}", highlight=False)
