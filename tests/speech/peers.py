"""Peers that tests compare with."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import torch


def import_torchaudio() -> ModuleType:
    """Return torchaudio, also where torch is built for CPUs only.

    Its extension is linked against CUDA; without it torchaudio falls back to PyTorch, so a module that says "no
    extension" stands in for the extension's loader before the first import.
    """
    if torch.version.cuda is None and "torchaudio" not in sys.modules:
        module = ModuleType("torchaudio._extension")

        def fail_if_no_align(function: Any) -> Any:
            def fail(*given: Any, **options: Any) -> Any:
                raise RuntimeError(f"{function.__name__} needs torchaudio's extension")

            return fail

        for name, value in {
            "_IS_TORCHAUDIO_EXT_AVAILABLE": False,
            "_IS_ALIGN_AVAILABLE": False,
            "_IS_RIR_AVAILABLE": False,
            "fail_if_no_align": fail_if_no_align,
            "_load_lib": lambda name: False,
        }.items():
            setattr(module, name, value)
        sys.modules["torchaudio._extension"] = module
    return importlib.import_module("torchaudio")
