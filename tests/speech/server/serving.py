"""Runs ``kd speech serve`` in a process of its own, and says whether it has imported torch."""

from __future__ import annotations

import sys

from apps.speech.serve_cli import add_serve, run_serve
from kdcore.command_line import Parser

if __name__ == "__main__":
    parser = Parser(prog="kd speech")
    add_serve(parser.add_subparsers(dest="verb"))
    code = run_serve(parser.parse_args(["serve", *sys.argv[1:]]))
    print(f"torch: {'torch' in sys.modules}", file=sys.stderr)
    sys.exit(code)
