"""docs/on_device.md and the programs of examples/speech, run for real with a small exported folder."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import soundfile

from apps.cli import main
from data_scripts.simulate_speech import simulate
from tests.speech.device.exported import export_tones, silence, spoken
from tests.speech.server.served import Served, running
from tests.speech.small_runs import run, small

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "on_device.md"
EXAMPLES = ROOT / "examples" / "speech"
UNIT = EXAMPLES / "kd-speech.service"
SAID = "yes no"
WAIT = 30.0


def blocks(language: str) -> list[str]:
    """Return the page's blocks of a language; sh is run here, bash needs a microphone, the network or root."""
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def lines(language: str) -> list[str]:
    """Return the commands of these blocks, without comments."""
    found = [line for block in blocks(language) for line in block.splitlines()]
    return [stripped for line in found if (stripped := re.sub(r"\s+#.*", "", line).strip())]


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    local = "127.0.0.1,localhost"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "NO_PROXY": local, "no_proxy": local, **more}


def ran(words: list[str], folder: Path, code: int = 0, **more: str) -> str:
    """Run a command and return what it printed; on stderr where it is to fail."""
    done = subprocess.run(words, cwd=folder, env=environment(**more), capture_output=True, timeout=120)
    said, problem = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == code, f"{words}\n{said}\n{problem}"
    return problem if code else said


def example(name: str, *arguments: str, code: int = 0, folder: Path = ROOT, **more: str) -> str:
    """Run one of the Python examples."""
    return ran([sys.executable, str(EXAMPLES / name), *arguments], folder, code, **more)


def finals(printed: str) -> list[str]:
    """Return the lines that a terminal keeps of what listen.py printed."""
    return [line.rpartition("\r\x1b[K")[2] for line in printed.split("\n")[:-1]]


# -- the page ----------------------------------------------------------------------------------------------------------


@dataclass
class Desk:
    """The folder where somebody follows the page: a finished run, recordings, and the server that they start."""

    folder: Path
    port: int
    capsys: pytest.CaptureFixture[str]
    printed: dict[str, str] = field(default_factory=dict)
    server: subprocess.Popen[str] | None = None

    def follow(self, line: str) -> None:
        """Run one command; one that serves goes on in the background, as in a terminal of its own."""
        command = line.replace(":8000", f":{self.port}").replace("--port 8000", f"--port {self.port}")
        if command.startswith("kd speech serve"):
            assert self.server is None
            self.server = subprocess.Popen(
                shlex.split(command), cwd=self.folder, env=environment(), stderr=subprocess.PIPE, text=True
            )
            self._wait(self.server)
            return
        if command.startswith("kd ") and not re.search(r"[|<>*?$]", command):
            # what needs no shell needs no process of its own either, each of which imports everything anew
            assert main(shlex.split(command)[1:]) == 0, self.capsys.readouterr().err
            self.printed[line] = self.capsys.readouterr().out
        else:
            self.printed[line] = ran(["bash", "-euo", "pipefail", "-c", command], self.folder)
        if line.startswith("kd speech check"):
            # the student of a run that takes seconds hears nothing: what follows is said to one that does
            shutil.rmtree(self.folder / "exported")
            export_tones(self.folder / "exported")

    def stop(self) -> str:
        """End the server as systemd does; return its log."""
        assert self.server is not None
        self.server.terminate()
        _, log = self.server.communicate(timeout=WAIT)
        assert self.server.returncode == 0, log
        return log

    def _wait(self, server: subprocess.Popen[str]) -> None:
        until = time.monotonic() + WAIT
        while time.monotonic() < until:
            assert server.poll() is None, server.communicate()[1]
            with suppress(urllib.error.URLError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health"):
                return
            time.sleep(0.05)
        raise AssertionError("the server was not ready in time")


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Desk]:
    pipeline = small("demo", simulate(tmp_path / "data", utterances=12), tmp_path / "small")
    run(pipeline)
    (tmp_path / "runs").mkdir()
    shutil.move(pipeline.run.path, tmp_path / "runs" / "mine")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "calls").mkdir()
    for name in ("talk.flac", "calls/monday.wav", "calls/tuesday.wav"):
        soundfile.write(tmp_path / name, spoken(SAID), 16_000)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found = Desk(tmp_path, probe.getsockname()[1], capsys)
    yield found
    if found.server and found.server.poll() is None:
        found.server.kill()
        found.server.communicate()


def test_every_command_of_the_page_works(desk: Desk) -> None:
    for line in lines("sh"):
        desk.follow(line)
    log = desk.stop()
    assert "traceback" not in log.lower()
    printed = desk.printed
    (checked,) = [text for line, text in printed.items() if line.startswith("kd speech check")]
    assert checked.count("ok  ") >= 12 and "BAD" not in checked

    transcribed = {line: text for line, text in printed.items() if "kd speech transcribe" in line}
    assert len(transcribed) >= 14
    to_files = {line for line in transcribed if " --out " in line or " > " in line}
    assert all(SAID in text for line, text in transcribed.items() if line not in to_files), transcribed
    texts = [json.loads(line)["text"] for line in (desk.folder / "texts.jsonl").read_text("utf-8").splitlines()]
    assert texts == [SAID, SAID]
    subtitles = ["talk.srt", "talk.vtt", "subtitles/monday.srt", "subtitles/tuesday.srt"]
    assert all(SAID in (desk.folder / name).read_text("utf-8") for name in subtitles)

    asked = {line: text for line, text in printed.items() if "localhost:8000" in line or "examples/" in line}
    assert len(asked) == 9
    heard = {line for line in asked if "talk" in line or "self_test" in line}
    assert all(SAID in asked[line] for line in heard) and len(heard) == 6, asked
    assert any(" --> " in asked[line] for line in heard)
    (live,) = [text for line, text in asked.items() if "listen.py" in line]
    assert finals(live) == [SAID]


def test_the_json_of_the_page_is_what_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("json")
    shown = json.loads(block)
    assert main(["speech", "transcribe", "--model", str(folder), "--json", str(folder / "self_test.wav")]) == 0
    row = json.loads(capsys.readouterr().out)
    assert list(row) == list(shown) and list(row["words"][0]) == list(shown["words"][0])


def test_commands_that_are_not_run_could_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their options exist, and so do the extras and files that they name."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    checked = 0
    for line in lines("bash"):
        for command in line.split("|"):
            words = [word for word in shlex.split(command) if word != "sudo"]
            named = re.search(r"\.\[(\w+)\]", command)
            assert named is None or named[1] in extras, line
            assert all((ROOT / word).exists() for word in words if word.startswith("examples/")), line
            if words[:2] == ["kd", "speech"]:
                _known(words[2:], capsys)
                checked += 1
    assert checked == 3


def _known(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Compare options with the help of a verb."""
    with pytest.raises(SystemExit) as stopped:
        main(["speech", words[0], "--help"])
    usage = capsys.readouterr().out
    assert stopped.value.code == 0
    for word in words[1:]:
        assert not word.startswith("--") or re.search(rf"{word}\b", usage), f"{word}: not among\n{usage}"


def test_options_and_files_that_the_page_speaks_of_exist(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    for option in set(re.findall(r"`(--[a-z0-9-]+)", text)):
        for verb in ("transcribe", "serve", "export"):
            with suppress(AssertionError):
                _known([verb, option], capsys)
                break
        else:
            raise AssertionError(f"{option}: is no option of transcribe, serve or export")
    for name in set(re.findall(r"`((?:examples|tests|docs)/[\w./-]+)`", text)):
        assert (ROOT / name).exists(), name
    assert "docs/on_device.md" in (ROOT / "README.md").read_text(encoding="utf-8")


# -- the examples ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tones(tmp_path_factory.mktemp("exported") / "tones")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with running(folder) as server:
        yield server


def test_listen_prints_each_segment(served: Served, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "two.flac", np.concatenate([spoken(SAID, after=1.4), spoken("no")]), 16_000)
    printed = example("listen.py", str(tmp_path / "two.flac"), served.ws)
    assert finals(printed) == [SAID, "no"]
    # what may still change grows in place
    partials = [part for part in printed.split("\r\x1b[K") if part and not part.endswith("\n")]
    assert len(partials) > 2 and all(SAID.startswith(part) or part in ("n", "no") for part in partials)
    assert len((EXAMPLES / "listen.py").read_text(encoding="utf-8").splitlines()) <= 40


def test_listen_says_why_it_is_refused(served: Served, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "narrow.wav", silence(0.5), 4_000)
    said = example("listen.py", str(tmp_path / "narrow.wav"), served.ws, code=1)
    assert "rate: got 4000" in said and "Traceback" not in said
    assert "listen.py FILE|--mic" in example("listen.py", code=1)


MICROPHONE = """
import soundfile

class RawInputStream(soundfile.SoundFile):
    def __init__(self, channels, dtype):
        super().__init__("said.wav")
    def read(self, frames):
        data = self.buffer_read(frames, "int16")
        if not len(data):
            raise KeyboardInterrupt
        return data, False
"""


def test_listen_hears_the_microphone_until_it_is_interrupted(served: Served, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "said.wav", spoken(SAID), 16_000)
    (tmp_path / "sounddevice.py").write_text(MICROPHONE, encoding="utf-8")
    printed = example("listen.py", "--mic", served.ws, folder=tmp_path, PYTHONPATH=str(tmp_path))
    assert finals(printed) == [SAID]


def test_the_openai_client_hears_words_with_times(
    served: Served, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = str(EXAMPLES / "openai_client.py")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(sys, "argv", [program, str(folder / "self_test.wav"), f"{served.url}/v1"])
    runpy.run_path(program, run_name="__main__")
    first, *words = capsys.readouterr().out.splitlines()
    assert first == f"tones: {SAID}"
    assert [line.split()[2] for line in words] == SAID.split()
    times = [float(number) for line in words for number in line.split()[:2]]
    assert times == sorted(times) and times[-1] > 0
    (tmp_path / "no.wav").write_text("no audio", encoding="utf-8")
    sys.argv[1] = str(tmp_path / "no.wav")
    with pytest.raises(SystemExit, match=r"422.*no\.wav"):
        runpy.run_path(program, run_name="__main__")


def test_curl_answers_in_both_forms(served: Served, folder: Path, tmp_path: Path) -> None:
    script = ["sh", str(EXAMPLES / "transcribe.sh")]
    shutil.copy(folder / "self_test.wav", tmp_path / "a file; of, mine.wav")
    first, srt = ran([*script, "a file; of, mine.wav", served.url], tmp_path).split("\n", 1)
    assert [word["word"] for word in json.loads(first)["words"]] == SAID.split()
    assert re.fullmatch(r"1\n00:00:0.* --> 00:00:0.*\nyes no\n\n?", srt)
    (tmp_path / "no.wav").write_text("no audio", encoding="utf-8")
    assert "422" in ran([*script, "no.wav", served.url], tmp_path, code=22)


def float32_alone(folder: Path, where: Path) -> Path:
    """Return a copy of an exported folder as ``kd speech export --only fp32`` leaves it to sherpa-onnx."""
    return Path(shutil.copytree(folder, where / "fp32", ignore=shutil.ignore_patterns("model.int8.onnx")))


def test_sherpa_onnx_hears_the_same(folder: Path, tmp_path: Path) -> None:
    for each in (folder, float32_alone(folder, tmp_path)):
        assert example("sherpa_onnx_client.py", str(each), str(folder / "self_test.wav")).strip() == SAID
    assert "sherpa_onnx_client.py FOLDER FILE" in example("sherpa_onnx_client.py", code=1)


def test_the_commands_in_its_head_build_the_program_in_cpp(folder: Path, tmp_path: Path) -> None:
    if shutil.which("g++") is None or importlib.util.find_spec("sherpa_onnx") is None:
        pytest.skip("needs g++ and the headers of sherpa-onnx")
    text = (EXAMPLES / "sherpa_onnx.cc").read_text(encoding="utf-8")
    commands = "\n".join(re.findall(r"^//   (.*)$", text, re.MULTILINE)).replace("\n  -l", " -l")
    assert commands.count("\n") == 2
    shutil.copy(EXAMPLES / "sherpa_onnx.cc", tmp_path)
    (tmp_path / "exported").symlink_to(folder)
    assert ran(["bash", "-euc", commands.replace("g++", "g++ -Wall -Wextra -Werror")], tmp_path).strip() == SAID
    float32_alone(folder, tmp_path)
    assert ran(["./listen", "fp32", "fp32/self_test.wav"], tmp_path).strip() == SAID


def test_the_unit_is_one_and_gives_the_service_time_to_drain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = UNIT.read_text(encoding="utf-8")
    rows = re.findall(r"^(\w+)=(.*)$", text.replace("\\\n", " "), re.MULTILINE)
    unit = dict(rows)
    wanted = {"DynamicUser": "yes", "ProtectSystem": "strict", "NoNewPrivileges": "yes", "Restart": "on-failure"}
    assert wanted.items() <= unit.items() and "MemoryMax" in unit
    command, *words = shlex.split(unit["ExecStart"])
    assert words[:2] == ["speech", "serve"]
    _known(words[1:], capsys)
    # live streams first, then uploads
    drain = float(words[words.index("--drain-seconds") + 1])
    assert 2 * drain < float(unit["TimeoutStopSec"])
    if shutil.which("systemd-analyze") is None:
        pytest.skip("the rest needs systemd-analyze")
    # it wants a program that is there
    (tmp_path / UNIT.name).write_text(text.replace(command, sys.executable), encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / UNIT.name)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and UNIT.name not in done.stderr, done.stderr
