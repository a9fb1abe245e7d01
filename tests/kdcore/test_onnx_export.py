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
from kdcore.onnx_export import ParityError, check_parity, export_onnx, quantise_onnx, trace_onnx


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


class Recurrence(nn.Module):
    """One step of an LSTM between two products, its state in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell, self.last = nn.Linear(12, 16), nn.LSTM(16, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
        frames, (hidden, memory) = self.cell(
            torch.relu(self.first(x)), (hidden.transpose(0, 1), memory.transpose(0, 1))
        )
        return self.last(frames), hidden.transpose(0, 1), memory.transpose(0, 1)


def write_recurrence(module: Recurrence, path: Path) -> None:
    varies = {0: "N"}
    inputs = {"x": varies, "hidden": varies, "memory": varies}
    outputs = {"y": varies, "hidden_next": varies, "memory_next": varies}
    example = [torch.randn(2, 3, 12), torch.zeros(2, 1, 8), torch.zeros(2, 1, 8)]
    trace_onnx(module, example, path, inputs=inputs, outputs=outputs, metadata={"made_for": "tests", "empty": ""})


def recurrence_batches() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [
        {"x": torch.randn(n, 3, 12), "hidden": torch.randn(n, 1, 8), "memory": torch.randn(n, 1, 8)} for n in (1, 2, 5)
    ]


def test_a_traced_step_answers_as_pytorch_for_any_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, path = Recurrence(), tmp_path / "step.onnx"
    write_recurrence(module, path)
    outputs = ["y", "hidden_next", "memory_next"]
    assert check_parity(module, path, recurrence_batches(), outputs=outputs) < 1e-5
    model = onnx.load(path)
    assert {each.key: each.value for each in model.metadata_props} == {"made_for": "tests", "empty": ""}
    assert [each.name for each in (*model.graph.input, *model.graph.output)] == ["x", "hidden", "memory", *outputs]
    written = path.read_bytes()
    assert str(Path(__file__).parent.parent).encode() not in written and str(tmp_path).encode() not in written
    write_recurrence(module, path)
    assert path.read_bytes() == written


def test_int8_keeps_weights_that_int8_holds_and_is_near_for_others(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, outputs = Recurrence(), ["y", "hidden_next", "memory_next"]
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim == 2:  # in each row whole multiples of largest / 127
                steps = weight.abs().amax(1, keepdim=True) / 127
                weight.copy_((weight / steps).round() * steps)
    source, path = tmp_path / "step.onnx", tmp_path / "step.int8.onnx"
    write_recurrence(module, source)
    quantise_onnx(source, path)
    model = onnx.load(path)
    assert {each.key: each.value for each in model.metadata_props} == {"made_for": "tests", "empty": ""}
    assert sorted(node.op_type for node in model.graph.node if "Integer" in node.op_type or "LSTM" in node.op_type) == [
        "DynamicQuantizeLSTM",
        "MatMulInteger",
        "MatMulInteger",
    ]
    tensors = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    # no signed weights, and none left in float32
    assert not any(each.dtype == np.int8 for each in tensors.values())
    assert not any(each.dtype == np.float32 and min(each.shape) > 4 for each in tensors.values() if each.ndim > 1)
    products = [node for node in model.graph.node if node.op_type == "MatMulInteger"]
    for node, layer in zip(products, (module.first, module.last), strict=True):
        held = tensors[node.input[1]].astype(np.float64) - tensors[node.input[3]]
        scale = layer.weight.detach().abs().amax(1).numpy() / 127
        np.testing.assert_allclose(held * scale, layer.weight.detach().numpy().T, atol=1e-6)
    # values are rounded as they come: near, and not the same
    with pytest.raises(ParityError):
        check_parity(module, path, recurrence_batches(), outputs=outputs)
    assert check_parity(module, path, recurrence_batches(), outputs=outputs, tolerance=0.05) < 0.05
