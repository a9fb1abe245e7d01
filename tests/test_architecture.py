"""The rules of the house, read from the source: who may import whom, what nobody may call, how long things may be."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kdcore", "apps", "data_scripts", "benchmarks")
MODULE_LINES, FUNCTION_LINES = 500, 60


def sources() -> list[Path]:
    return sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))


@lru_cache(maxsize=1024)
def parsed(text: str) -> ast.Module:
    """Each source is read once for all rules."""
    return ast.parse(text)


@lru_cache(maxsize=1024)
def nodes(tree: ast.Module) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree))


def trees() -> Iterator[tuple[str, ast.Module]]:
    for file in sources():
        yield file.relative_to(ROOT).as_posix(), parsed(file.read_text(encoding="utf-8"))


def imported(name: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of every import, those inside functions and relative ones as well."""
    package = name.removesuffix(".py").split("/")[:-1]
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from apps import recsys` names a package in its second half
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def below(dotted: str, package: str) -> bool:
    return dotted == package or dotted.startswith(package + ".")


def forbidden_imports() -> Iterator[str]:
    for name, tree in trees():
        parts = name.split("/")
        wing = parts[1] if parts[0] == "apps" and len(parts) > 2 else None
        for line, dotted in imported(name, tree):
            where = f"{name}:{line} imports {dotted}"
            if parts[0] == "kdcore" and any(below(dotted, each) for each in ("apps", "data_scripts", "benchmarks")):
                yield f"{where}: kdcore knows no app"
            if parts[0] in ("apps", "data_scripts") and below(dotted, "benchmarks"):
                yield f"{where}: benchmarks are on top"
            if wing and below(dotted, "apps"):
                target = dotted.split(".")[1] if "." in dotted else ""
                if target != wing and (wing, target) != ("multimodal", "speech"):
                    yield f"{where}: wings do not import each other"
            if parts[0] == "apps" and below(dotted, "data_scripts") and parts[-1] != "cli.py":
                yield f"{where}: only cli.py prepares data"
            if name.startswith("kdcore/losses/"):
                first = dotted.split(".")[0]
                if not (below(dotted, "torch") or below(dotted, "kdcore.losses") or first in sys.stdlib_module_names):
                    yield f"{where}: losses import torch and nothing else"


def test_arrows_point_down() -> None:
    assert list(forbidden_imports()) == []


NEVER_IMPORTED = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
NEVER_CALLED = {
    *("torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system"),
    *("torch.jit.load", "torch.jit.save", "pandas.read_pickle"),
}


def dotted_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def safe_loader(call: ast.Call, tree: ast.Module) -> bool:
    """Return whether a call of yaml.load names a loader of the same module that is a SafeLoader."""
    safe = {
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef) and [dotted_name(base) for base in node.bases] == ["yaml.SafeLoader"]
    }
    return any(each.arg == "Loader" and dotted_name(each.value) in safe for each in call.keywords)


def forbidden_calls() -> Iterator[str]:
    for name, tree in trees():
        for line, dotted in imported(name, tree):
            if any(below(dotted, each) for each in NEVER_IMPORTED) or dotted in NEVER_CALLED:
                yield f"{name}:{line}: imports {dotted}"
        for node in nodes(tree):
            if isinstance(node, ast.Assert):
                yield f"{name}:{node.lineno}: assert (python -O removes it; raise instead)"
            elif isinstance(node, ast.Call) and (called := dotted_name(node.func)) in NEVER_CALLED:
                if called == "yaml.load" and safe_loader(node, tree):
                    continue
                yield f"{name}:{node.lineno}: calls {called}"
            elif isinstance(node, ast.ExceptHandler) and node.type is None:
                yield f"{name}:{node.lineno}: bare except"
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                    yield f"{name}:{node.value.lineno}: allow_pickle"
            elif isinstance(node, ast.keyword) and node.arg == "shell":
                yield f"{name}:{node.value.lineno}: shell"


def test_nothing_unpickles_evaluates_or_asserts() -> None:
    assert list(forbidden_calls()) == []


def too_long() -> Iterator[str]:
    for file in sources():
        name, text = file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")
        lines = len(text.splitlines())
        if lines > MODULE_LINES:
            yield f"{name}: {lines} lines"
        for node in nodes(parsed(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    yield f"{name}:{node.lineno}: {node.name} has {length} lines"


def test_modules_and_functions_stay_short() -> None:
    assert list(too_long()) == []


def test_every_module_and_public_thing_says_what_it_is() -> None:
    silent = []
    for name, tree in trees():
        if not ast.get_docstring(tree):
            silent.append(name)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                silent += [] if ast.get_docstring(node) else [f"{name}:{node.lineno}: {node.name}"]
    assert silent == []


@pytest.mark.parametrize(
    ("path", "code", "finding"),
    [
        ("kdcore/x.py", "def f():\n    from apps.recsys import export", "kdcore knows no app"),
        ("kdcore/x.py", "import data_scripts.movielens", "kdcore knows no app"),
        ("apps/speech/x.py", "from apps import recsys", "wings do not import each other"),
        ("apps/speech/x.py", "from ..recsys import export", "wings do not import each other"),
        ("apps/speech/x.py", "from apps.multimodal import data", "wings do not import each other"),
        ("apps/multimodal/x.py", "from apps.speech import data", ""),
        ("apps/recsys/pipeline.py", "from data_scripts import catalogue", "only cli.py prepares data"),
        ("apps/recsys/cli.py", "from data_scripts import catalogue", ""),
        ("kdcore/losses/x.py", "import numpy", "losses import torch and nothing else"),
        ("kdcore/losses/x.py", "from kdcore.config import nearest", "losses import torch and nothing else"),
        ("kdcore/losses/x.py", "import math, torch\nfrom .registry import loss", ""),
        ("kdcore/x.py", "import pickle", "imports pickle"),
        ("kdcore/x.py", "import torch\ntorch.load('x')", "calls torch.load"),
        ("kdcore/x.py", "from torch import load", "imports torch.load"),
        ("kdcore/x.py", "eval('1')", "calls eval"),
        ("kdcore/x.py", "model.eval()", ""),
        ("kdcore/x.py", "yaml.load(text, Loader=yaml.Loader)", "calls yaml.load"),
        ("kdcore/x.py", "class L(yaml.Loader):\n    pass\nyaml.load(text, Loader=L)", "calls yaml.load"),
        ("kdcore/x.py", "class L(yaml.SafeLoader):\n    pass\nyaml.load(text, Loader=L)", ""),
        ("kdcore/x.py", "assert True", "assert"),
        ("kdcore/x.py", "try:\n    pass\nexcept:\n    pass", "bare except"),
        ("kdcore/x.py", "import numpy as np\nnp.load('x', allow_pickle=True)", "allow_pickle"),
        ("kdcore/x.py", "\n" * 500 + "x = 1", "501 lines"),
        ("kdcore/x.py", "def f():\n" + "    x = 1\n" * 60, "f has 61 lines"),
    ],
)
def test_the_rules_find_what_breaks_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, code: str, finding: str
) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(code)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    found = [*forbidden_imports(), *forbidden_calls(), *too_long()]
    assert (len(found) == 1 and finding in found[0]) if finding else found == []
