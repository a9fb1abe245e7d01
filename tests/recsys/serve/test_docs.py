"""Every example of docs/serving.md, run in the order of the page against real servers."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

from tests.recsys.serve.served import ROOT

PAGE = ROOT / "docs" / "serving.md"
# these make an export, which tests/recsys/test_demo.py does; here there is one already
MAKES_ONE = ("make demo", "cp -r runs/demo")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def blocks(ports: dict[str, int]) -> list[tuple[str, str]]:
    text = PAGE.read_text(encoding="utf-8")
    for wanted, port in ports.items():
        text = text.replace(wanted, str(port))
    return re.findall(r"^```(sh|python|json)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def wait_for(port: int, process: subprocess.Popen) -> None:
    for _ in range(600):
        assert process.poll() is None, process.stderr.read().decode()
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError("the server was not ready in time")


def test_every_example_of_the_page_works(model, tmp_path):
    shutil.copytree(model, tmp_path / "exported")
    ports = {"8000": free_port(), "8001": free_port()}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    servers, answers = [], []

    def start(line: str) -> None:
        process = subprocess.Popen(line.split(), cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
        servers.append(process)
        wait_for(int(re.search(r"--port (\d+)", line)[1]), process)

    try:
        for kind, text in blocks(ports):
            if kind == "json":
                json.loads(text)
                continue
            if kind == "python":
                done = subprocess.run(
                    [sys.executable, "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True
                )
                assert done.returncode == 0, done.stderr
                continue
            text = text.replace("\\\n", " ")
            lines = [line for line in text.splitlines() if line.strip() and not line.startswith(MAKES_ONE)]
            for line in lines:
                line = line.removeprefix(". .venv/bin/activate && ")
                if line.startswith("kd recsys serve"):
                    start(line)
                    continue
                done = subprocess.run(
                    ["bash", "-ec", line], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
                )
                assert done.returncode == 0, f"{line}\n{done.stderr}"
                if "/v1/" in line:
                    answers.append(json.loads(done.stdout))
    finally:
        for process in servers:
            process.terminate()
        for process in servers:
            process.wait(30)
    assert len(servers) == 2
    assert len(answers) == 6
    assert not [answer for answer in answers if "error" in answer]
    user, history, batch, event, reload, about = answers
    assert len(user["items"]) == len(history["items"]) == 3
    assert len(history["items"][0]["why"]) == 2
    assert [len(each["items"]) for each in batch["results"]] == [3, 3]
    assert event["stored"] == 1
    assert reload["workers"] == 2
    assert about["items"] == 60
    assert (tmp_path / "events.parquet").exists()
