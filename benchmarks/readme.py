"""Writes the README's tables from ``benchmarks/results/*.json``: no figure in the README is typed by hand.

Run ``python -m benchmarks.readme`` after a benchmark; ``--check`` only says whether the README is in step.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import readme_speech
from kdcore.run import read_json, write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def quality(result: dict[str, Any]) -> str:
    """Return the table of the dimension-8 students on ml-100k."""
    lines = [
        "| teacher | teacher's NDCG@10 | best plain model | SVD of the teacher | student alone | **student** "
        "| gap closed | over SVD |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in result["runs"].values():
        summary = run["summary"]
        models = summary["models"]
        name = {role: next(n for n in models if n.startswith(f"{role}/")) for role in ("teacher", "student")}
        alone, svd = (next(n for n in models if n.startswith(p)) for p in ("student_alone/", "baseline/svd"))
        best, closed = summary["best_plain"], summary["gap_closed"]
        over = summary["student_minus"][svd]
        cells = [
            name["teacher"].split("/")[1],
            _mean(models[name["teacher"]]),
            f"{best.split('/')[1]} {_mean(models[best])}",
            _mean(models[svd]),
            _mean(models[alone]),
            f"**{_mean(models[name['student']])}**",
            f"{closed['value']:.0%} [{closed['low']:.0%}, {closed['high']:.0%}]",
            f"{over['value']:+.4f} [{over['low']:+.4f}, {over['high']:+.4f}]",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    seeds = len(next(iter(result["runs"].values()))["settings"]["seeds"])
    lines += [
        "",
        f"{result['data']}; NDCG@10 on test, mean ± sd over {seeds} seeds, intervals 95 % over users and seeds; "
        f"{result['trials_each']} search trials on validation for every model alike. "
        "`kd recsys bench quality --json benchmarks/results/recsys_quality.json`",
    ]
    return "\n".join(lines)


def beauty(result: dict[str, Any]) -> str:
    """Return the table of the small SASRec on Beauty."""
    run = next(iter(result["runs"].values()))
    models = run["summary"]["models"]
    params = {f"{row['role']}/{row['model']}": row["params"] for row in run["rows"]}
    lines = ["| model | role | parameters | NDCG@10 on test |", "|---|---|---|---|"]
    for name, values in models.items():
        role, model = name.split("/")
        lines.append(f"| {model} | {role.replace('_', ' ')} | {params[name]:,} | {_mean(values)} |")
    kept = run["summary"]["kept_of_teacher"]
    gain = next(v for name, v in run["summary"]["student_minus"].items() if name.startswith("student_alone/"))
    teacher, student = (next(n for n in models if n.startswith(f"{role}/")) for role in ("teacher", "student"))
    lines += [
        "",
        f"{result['data']}; the student keeps {kept:.1%} of the teacher's NDCG@10 with "
        f"1/{params[teacher] / params[student]:.1f} of its parameters, and {gain['value']:+.4f} "
        f"[{gain['low']:+.4f}, {gain['high']:+.4f}] over the student alone (mean ± sd over "
        f"{len(run['settings']['seeds'])} seeds of the student, one teacher); student alone has the best of "
        "4 settings tried on validation, the student the best of 3. "
        "`kd recsys bench beauty --json benchmarks/results/recsys_beauty.json`",
    ]
    return "\n".join(lines)


def train(result: dict[str, Any]) -> str:
    """Return the table of training times beside RecBole's."""
    lines = [
        "| model | RecBole's final validation NDCG@10 | RecBole, CPU s | ours to that NDCG@10, CPU s "
        "| our test HR@10 / NDCG@10 |",
        "|---|---|---|---|---|",
    ]
    for name, model in result["models"].items():
        summary, peer, target = model["summary"], model.get("peer"), model.get("target")
        wanted = f"{target['ndcg@10']:.4f} ({target['source']})" if target else "-"
        theirs = f"{peer['summary']['cpu_seconds']['mean']:.1f}" if peer else "not measured"
        reached = model.get("cpu_seconds_to_target") or summary["cpu_seconds_to_best"]
        ours = f"{reached['mean']:.1f} ± {reached['sd']:.1f}" + ("" if target else " (to the selected epoch)")
        test = f"{summary['test hr@10']['mean']:.4f} / {summary['test ndcg@10']['mean']:.4f}"
        lines.append(f"| {name} | {wanted} | {theirs} | {ours} | {test} |")
    lines += [
        "",
        "ml-100k, leave-last-out, one thread. `kd recsys bench train --json benchmarks/results/recsys_train.json`",
    ]
    return "\n".join(lines)


def teachers(result: dict[str, Any]) -> str:
    """Return the table of teachers under the protocols other libraries report."""
    lines = ["| teacher | protocol | NDCG@10 | HR@10 |", "|---|---|---|---|"]
    for row in result["rows"]:
        lines.append(f"| {row['model']} | {row['protocol']} | {_mean(row['ndcg@10'])} | {_mean(row['hr@10'])} |")
    return "\n".join([*lines, "", "`kd recsys bench teachers --json benchmarks/results/recsys_teachers.json`"])


def evaluate(result: dict[str, Any]) -> str:
    """Return the sentence on full evaluation."""
    return (
        f"Full evaluation of {result['users']:,} users x {result['items']:,} items at dimension "
        f"{result['dimension']}: {result['seconds']:.1f} s on {result['threads']} threads "
        f"({result['gflop_per_s']:.0f} GFLOP/s), {result['peak_rss_bytes'] / 1e9:.2f} GB. "
        "`kd recsys bench evaluate --json benchmarks/results/recsys_evaluate.json`"
    )


def serve(result: dict[str, Any]) -> str:
    """Return the table of what the service promises."""
    lines = ["| what | measured | target | met |", "|---|---|---|---|"]
    for name, figure in result["figures"].items():
        value = f"{figure['value']:,.{0 if abs(figure['value']) >= 100 else 2}f}".removesuffix(".00")
        met = "yes" if figure["met"] else "**no**"
        lines.append(f"| {name} | {value} {figure['unit']}".rstrip() + f" | {figure['target']} | {met} |")
    parts = result["parts"]
    beside = ""
    if "calibration" in parts:
        empty = parts["calibration"]["rows"][0]["requests_per_second"]
        beside = f"an empty handler gave {empty:,.0f} requests a second (15,000 where the targets were stated); "
    missing = [name for name, part in parts.items() if "skipped" in part]
    left_out = f"left out: {', '.join(missing)}; " if missing else ""
    lines += [
        "",
        f"One core for the server, another for its clients; {result['model']}; {beside}{left_out}"
        f"{'a short run; ' if result['quick'] else ''}"
        "`kd recsys bench serve --json benchmarks/results/recsys_serve.json`",
    ]
    return "\n".join(lines)


def losses(result: dict[str, Any]) -> str:
    """Return the table of the core's losses beside other libraries, and the sentences on memory and the cache."""
    rows, sizes = result["speed"]["rows"], result["speed"]["sizes"]
    peers = sorted({name for row in rows for name in row["ms"]} - {"kdsuite"})
    lines = [f"| loss | kdsuite, ms | {' | '.join(f'{peer}, ms' for peer in peers)} | share of the fastest | target |"]
    lines.append("|" + "---|" * (len(peers) + 4))
    for row in rows:
        times = [f"{row['ms'][name]:.2f}" if name in row["ms"] else "-" for name in ("kdsuite", *peers)]
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        met = ratio if row["ratio"] is None or row["ratio"] <= row["target"] else f"**{ratio}**"
        lines.append(f"| {row['loss']} | {' | '.join(times)} | {met} | {row['target']} |")
    cache, top = result["full_cache"], result["top_cache"]
    lines += [
        "",
        f"Forward and backward, batch {sizes['batch']}, {sizes['classes']:,} classes, {sizes['features']} features, "
        f"one thread, median of {sizes['repeats']}; a share above its target is bold. Distances and angles take "
        f"{result['relations']['extra_bytes'] / 1e6:.0f} MB beside their inputs; importing the losses adds "
        f"{result['imports']['milliseconds']:.0f} ms to importing torch.",
    ]
    if "seconds" in cache:
        lines[-1] += (
            f" The teacher cache reads 2,000 x 1,000 scores {cache['pickle_seconds'] / cache['seconds']:.0f} times "
            f"as fast as one pickle a sample, in {cache['bytes'] / cache['pickle_bytes']:.0%} of the bytes (as "
            "float16; the pickles hold float32);"
        )
    lines[-1] += (
        f" 1,000,000 x 100 top lists are written and read in {top['above_start_bytes'] / 1e6:.0f} MB above the start. "
        "`kd bench losses --json benchmarks/results/losses.json`"
    )
    return "\n".join(lines)


def _mean(values: dict[str, Any]) -> str:
    return f"{values['mean']:.4f}" + (f" ± {values['sd']:.4f}" if values["sd"] else "")


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "recsys_quality": quality,
    "recsys_beauty": beauty,
    "recsys_train": train,
    "recsys_teachers": teachers,
    "losses": losses,
    "recsys_evaluate": evaluate,
    "recsys_serve": serve,
    "speech_quality": readme_speech.quality,
    "speech_noise": readme_speech.noise,
    "speech_digits": readme_speech.digits,
    "speech_train": readme_speech.train,
    "speech_runtime": readme_speech.runtime,
}


def render(text: str) -> str:
    """Return the README's text with every generated section renewed."""
    for name, section in SECTIONS.items():
        file = RESULTS / f"{name}.json"
        body = section(read_json(file)) if file.exists() else "Not measured yet."
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md: no section {name!r}")
        text = pattern.sub(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)  # type: ignore[misc]
    return text


def main() -> int:
    """Renew the README, or check it."""
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = render(old)
    if "--check" in sys.argv[1:]:
        if old != new:
            print("README.md is not in step with benchmarks/results: run python -m benchmarks.readme", file=sys.stderr)
        return int(old != new)
    write_text(readme, new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
