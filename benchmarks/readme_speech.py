"""The README's tables of the speech benchmarks."""

from __future__ import annotations

from typing import Any


def quality(result: dict[str, Any]) -> str:
    """Return the table of recipes on AN4: error rates of the models, and the student's difference to itself alone."""
    lines = _recipes(result["runs"])
    for recipe, run in result["runs"].items():
        said, shown = [], False
        for metric, how in (("wer", "best path"), ("wer_lm", "with language model")):
            found = run["differences"].get(f"{metric} against student_alone, by utterance")
            if found is not None:
                said.append(f"{how} {_points(found)}")
                shown = shown or (found["high"] is not None and found["high"] < 0)
        verdict = "" if shown else " **No gain of the teacher is shown.**"
        alone, taught = (run["models"][role]["metrics"]["wer"]["mean"] for role in ("student_alone", "student"))
        relative = f"relative, best path, {100 * (taught / alone - 1):+.0f} %"
        lines.append(f"`{recipe}`: student minus student alone, points: {'; '.join(said)}; {relative}.{verdict}")
    for pair, found in result["between"].items():
        first, other = pair.split(" against ")
        said = [
            f"{how} {_points(found[metric])}"
            for metric, how in (("wer", "best path"), ("wer_lm", "with language model"))
            if metric in found
        ]
        lines.append(f"Student of `{first}` minus that of `{other}`, points: {'; '.join(said)}.")
    heard = result["teacher_on_training"]
    for share in sorted({each["wer"] for each in heard.values() if not each["folds"]}):
        lines.append(
            f"On the recordings it teaches, which it was trained on, the teacher errs in {share:.1%} of the words."
        )
    for recipe, each in heard.items():
        if each["folds"]:
            lines.append(
                f"The teachers of the {each['folds']:.0f} folds of `{recipe}` err in {each['wer']:.1%} of the words of "
                "those that they teach, which they were not trained on."
            )
    wanted = [
        f"{role} {100 * result['targets'][role]['wer']:.1f} ({100 * result['targets'][role]['wer_lm']:.1f})"
        for role in ("teacher", "student")
    ]
    lines.append(
        f"Wanted at most, by best path (with language model): {', '.join(wanted)}; relative "
        f"{100 * result['targets']['relative_difference']:+.0f} %."
    )
    return "\n".join([*lines, "", f"{result['data']}; intervals 95 % over utterances and seeds. {_command(result)}"])


def _recipes(runs: dict[str, Any]) -> list[str]:
    """Return the rows of the models of some recipes, and an empty line."""
    lines = [
        "| recipe | model | parameters | WER %, best path | with language model | training, CPU min |",
        "|---|---|---|---|---|---|",
    ]
    printed = set[str]()
    for recipe, run in runs.items():
        for role, model in run["models"].items():
            minutes = sum(model["train_cpu_seconds"]) / len(model["train_cpu_seconds"]) / 60
            shown = role.replace("_", " ")
            # recipes may share their teacher and their students alone
            if (name := f"{role if role != 'student' else recipe} {model['train_cpu_seconds']}") in printed:
                continue
            printed.add(name)
            cells = [
                f"`{recipe}`" if role == "student" else "",
                f"**{shown}**" if role == "student" else shown,
                f"{model['parameters']:,}",
                _percent(model["metrics"]["wer"]),
                _percent(model["metrics"]["wer_lm"]) if "wer_lm" in model["metrics"] else "-",
                f"{minutes:.0f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def train(result: dict[str, Any]) -> str:
    """Return the sentence on what a taught step costs."""
    ratio, target, symbols = result["ratio"], result["targets"], result["symbols"]
    return (
        f"On cached teachers a step costs {ratio['frame']:.2f} times a plain CTC step at the frame level (wanted "
        f"at most {target['frame']}) and {ratio['sequence of 4']:.2f} times at the sequence level with 4 hypotheses "
        f"(at most {target['sequence of 4']}); batches are {result['padding_share']:.1%} padding. A hypothesis "
        f"has {symbols['hypotheses']:.0f} symbols, a text {symbols['texts']:.0f}. {_command(result)}"
    )


def noise(result: dict[str, Any]) -> str:
    """Return the sentence on the recipe for noise."""
    models, found = result["models"], result["differences"]
    said = []
    for metric, how in (("wer", "best path"), ("wer_lm", "with language model")):
        rates = {role: _percent(model["metrics"][metric]) for role, model in models.items()}
        gain = found[f"{metric} against student_alone, by utterance"]
        remark = "" if gain["high"] < 0 else ", an interval that does not exclude 0"
        said.append(
            f"{how}, student alone {rates['student_alone']} % WER, student {rates['student']} % "
            f"(points {_points(gain)}{remark})"
        )
    return (
        f"{result['data']}. The teacher hears the recordings clean. {'; '.join(said)}. Relative, best path: "
        f"{result['relative_difference']:+.1%} (wanted {result['targets']['relative_difference']:+.0%}). "
        f"{_command(result)}"
    ).replace(". best path", ". Best path")


def digits(result: dict[str, Any]) -> str:
    """Return the table of speakers of digits that no model heard: each model of all corpora, beside one corpus."""
    shares, rates, target = result["digits"], result["wer"], result["targets"]
    speakers = list(next(iter(shares["all corpora"].values()))["by_speaker"])
    lines = [
        f"| model | trained on | digits right | {' | '.join(speakers)} | WER % on {result['words']} |",
        "|---" * (4 + len(speakers)) + "|",
    ]
    for corpora, models in shares.items():
        for role, share in models.items():
            each = " | ".join(f"{100 * share['by_speaker'][name]:.1f}" for name in speakers)
            shown = f"{100 * share['mean']:.1f} %"
            lines.append(
                f"| {role.replace('_', ' ')} | {corpora} | {shown} | {each} | {100 * rates[corpora][role]:.1f} |"
            )
    gaps = "; ".join(f"{role.replace('_', ' ')} {_points(each)}" for role, each in rates["differences"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"{result['data']}. Wanted at least {target['digits']:.0%} of the digits, and at most "
            f"{100 * target['wer_difference']:.1f} points of WER over one corpus: {gaps}. {_command(result)}",
        ]
    )


def runtime(result: dict[str, Any]) -> str:
    """Return the table of the exported student on the device."""
    target, commands, rates = result["targets"], result["commands"], result["word_error_rate"]
    small, tiny = result["size"].values()
    longest = next(name for name in commands if "one file" in name)
    rows: list[tuple[str, float, float, str]] = [
        ("bytes of the small student, int8", small["int8_bytes"], target["small_int8_bytes"], ",.0f"),
        ("bytes of the tiny one, int8", tiny["int8_bytes"], target["tiny_int8_bytes"], ",.0f"),
        ("real-time factor", commands["int8"]["real_time_factor"], target["real_time_factor"], ".4f"),
        (
            "the same with beam 16 and language model",
            commands["int8, beam 16, language model"]["real_time_factor"],
            target["real_time_factor_beam_lm"],
            ".4f",
        ),
        ("peak memory on an hour, MB", commands[longest]["peak_megabytes"], target["peak_megabytes"], ".0f"),
        ("process start to first word, s", result["starts"]["first_word_seconds"], target["first_word_seconds"], ".2f"),
        ("import to ready, s", result["starts"]["ready_seconds"], target["ready_seconds"], ".2f"),
        ("`.[ondevice]` adds, MB", result["installed"]["megabytes"], target["ondevice_megabytes"], ".0f"),
        (
            f"end of speech to last word, {result['server']['streams']} live streams, p95, ms",
            result["server"]["final_ms"]["p95"],
            target["final_ms_p95"],
            ".0f",
        ),
        ("int8 costs, WER", rates["int8 costs"], target["int8_costs"], "+.4f"),
        ("partial results that change", result["streaming"]["flicker"], target["flicker"], ".3f"),
        (
            "first partial result after the first word's end, p95, ms",
            result["streaming"]["first_partial_ms"]["p95"],
            result["streaming"]["look_ahead_ms"] + 200,
            ".0f",
        ),
    ]
    if (with_lm := rates.get("int8 costs, beam 16, language model")) is not None:
        rows.append(("int8 costs with beam 16 and language model, WER", with_lm, target["int8_costs"], "+.4f"))
    lines = ["| what | measured | wanted at most |", "|---|---|---|"]
    for name, value, most, form in rows:
        shown = f"{value:{form}}" if value <= most else f"**{value:{form}}**"
        lines.append(f"| {name} | {shown} | {most:,} |")
    for name, peer in result["sherpa_onnx"].items():
        if isinstance(peer, dict):
            lines.append(f"| text as sherpa-onnx writes it, {name} | {peer['same_text']:.1%} | (at least 99 %) |")
    usual = result["streaming"]["chunk_ms"]
    chunks = "".join(
        f" In chunks of {chunk} ms instead of {usual} (`kd speech export --chunk-ms`), float32: "
        f"first partial result p95 {each['first_partial_ms']['p95']:.0f} ms, real-time factor "
        f"{each['real_time_factor']:.4f}, same text {each['same_text']:.1%}."
        for chunk, each in result.get("chunks", {}).items()
    )
    server = result["server"]
    if "words_as_alone" in server:
        chunks += f" Of {server['words']} words of the live streams {server['words_as_alone']} are those of each alone."
    about = f"{result['data']}; one core; what misses is bold.{chunks} {_command(result)}"
    return "\n".join([*lines, "", about])


def _percent(values: dict[str, Any]) -> str:
    return f"{100 * values['mean']:.1f}" + (f" ± {100 * values['sd']:.1f}" if values["sd"] else "")


def _points(estimate: dict[str, Any]) -> str:
    return f"{100 * estimate['value']:+.1f} [{100 * estimate['low']:+.1f}, {100 * estimate['high']:+.1f}]"


def _command(result: dict[str, Any]) -> str:
    """Return the command that wrote a result."""
    return f"`{' '.join(result['provenance']['command'])}`"
