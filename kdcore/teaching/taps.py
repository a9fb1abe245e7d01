"""Named feature taps: what layers of a model put out, without the model knowing."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Taps:
    """Forward hooks on layers of a model, by path; a context manager that takes them off again.

    ``paths`` names what is kept: ``{"middle": "layers.1"}`` keeps the output of ``model.layers[1]`` as ``middle``. A
    path that ends in ``:in`` keeps the layer's first input. ``take`` returns what the last forward pass left and lets
    go of it, so that no graph outlives its step.

    Raises:
        ValueError: a path that is no layer (with the nearest ones), or a compiled model, inside which hooks may not
            run: tap the model, then compile.
    """

    def __init__(self, model: nn.Module, paths: Mapping[str, str]) -> None:
        if hasattr(model, "_orig_mod"):
            raise ValueError("taps: wanted a model that is not compiled (tap it first, then compile the step)")
        self.paths = dict(paths)
        self._kept: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        layers = dict(model.named_modules())
        for path in self.paths.values():
            layer = path.removesuffix(":in")
            if layer not in layers:
                near = difflib.get_close_matches(layer, [name for name in layers if name], n=3, cutoff=0.0)
                raise ValueError(f"taps: got the unknown layer {layer!r}; the nearest are {', '.join(near)}")
        self._layers = {name: layers[path.removesuffix(":in")] for name, path in self.paths.items()}

    def __enter__(self) -> Taps:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(self._hook(name, self.paths[name].endswith(":in"))))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._kept.clear()

    def _hook(self, name: str, take_input: bool) -> Any:
        def keep(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            value = inputs[0] if take_input else output
            if not isinstance(value, Tensor):
                raise TypeError(f"taps: {self.paths[name]!r} gives {type(value).__name__}, wanted a layer of a tensor")
            self._kept[name] = value

        return keep

    def take(self) -> dict[str, Tensor]:
        """Return the outputs by name and let go of them.

        Raises:
            ValueError: a layer did not run since the last take.
        """
        if missing := self.paths.keys() - self._kept.keys():
            raise ValueError(f"taps: {', '.join(sorted(missing))} did not run in the last forward pass")
        kept, self._kept = self._kept, {}
        return kept
