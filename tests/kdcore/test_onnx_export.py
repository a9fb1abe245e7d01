"""Exported models answer as PyTorch does, and the check notices when they do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from kdcore import onnx_export
from kdcore.onnx_export import ParityError, check_parity, export_onnx


class Scale(nn.Module):
    """Scores with ties: the input times a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def write_scale(folder: Path, factor: float) -> Path:
    path = folder / "scale.onnx"
    axes = {0: Dim("batch"), 1: Dim("width")}
    export_onnx(Scale(factor), [torch.ones(2, 3)], path, inputs={"x": axes}, outputs=["y"], top_k="y")
    return path


def test_top_k_takes_the_lower_index_first(tmp_path: Path) -> None:
    session = onnxruntime.InferenceSession(str(write_scale(tmp_path, 2.0)))
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 4, size=(20, 50)).astype(np.float32)
    scores[:3] = 1.0
    scores[3, ::2] = -np.inf
    for k in (1, 7, 50, 60):
        items, values = session.run(["top_items", "top_scores"], {"x": scores, "k": np.array([k])})
        wanted = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(items, wanted)
        np.testing.assert_array_equal(values, 2 * np.take_along_axis(scores, wanted, axis=1))


def test_parity_finds_what_differs(tmp_path: Path) -> None:
    path = write_scale(tmp_path, 2.0)
    batches = [{"x": torch.randn(4, 6)}, {"x": torch.full((1, 2), torch.inf)}]
    assert check_parity(Scale(2.0), path, batches, outputs=["y"]) == 0.0
    with pytest.raises(ParityError, match="output y: onnxruntime differs from PyTorch"):
        check_parity(Scale(2.001), path, batches, outputs=["y"])
    with pytest.raises(ParityError):
        check_parity(Scale(float("nan")), path, batches[:1], outputs=["y"])
    assert 0 < check_parity(Scale(2.001), path, batches[:1], outputs=["y"], tolerance=1e-2) < 1e-2
    with pytest.raises(ValueError, match="at least one"):
        check_parity(Scale(2.0), path, [], outputs=["y"])
    with pytest.raises(ValueError, match="wanted one of the outputs"):
        export_onnx(Scale(1.0), [torch.ones(2, 2)], path, inputs={"x": {0: Dim("b")}}, outputs=["y"], top_k="z")


def test_large_weights_lie_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "_INLINE_BYTES", 1000)
    layer = nn.Linear(64, 32).eval()
    path = tmp_path / "layer.onnx"
    export_onnx(layer, [torch.randn(2, 64)], path, inputs={"x": {0: Dim("batch")}}, outputs=["y"])
    assert sorted(each.name for each in tmp_path.iterdir()) == ["layer.onnx", "layer.onnx.data"]
    assert check_parity(layer, path, [{"x": torch.randn(5, 64)}], outputs=["y"]) < 1e-5
    assert {each.domain for each in onnx.load(path).opset_import} <= {"", "ai.onnx"}
