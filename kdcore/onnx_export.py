"""ONNX files of PyTorch modules, and the proof that onnxruntime answers as PyTorch does."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

OPSET = 20
# protobuf ends at 2 GiB; weights of more than this lie beside the model
_INLINE_BYTES = 1 << 30


class ParityError(FloatingPointError):
    """An exported model that does not answer as the PyTorch model does."""


def export_onnx(
    module: nn.Module,
    example_inputs: Sequence[Tensor],
    path: str | os.PathLike[str],
    *,
    inputs: Mapping[str, Mapping[int, Any]],
    outputs: Sequence[str],
    top_k: str | None = None,
) -> None:
    """Write ``module`` as ONNX in evaluation mode; the file holds no paths and no stack traces of this machine.

    Options:
        inputs: name -> {axis: ``torch.export.Dim``} of the axes that vary, in the order of the module's arguments.
            Give the example inputs at least 2 along those axes: a size of 1 would be taken for a constant.
        outputs: names of what the module returns.
        top_k: an output, float [B, N]; the model then also takes ``k`` int64 [1] and gives ``top_items`` int64 [B, k]
            and ``top_scores`` float32 [B, k], best first, equal scores in ascending order, k cut to N.
    Weights beyond 1 GiB are written to ``<name>.data`` beside ``path``; the two files belong together.
    """
    module.eval()
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            tuple(example_inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=tuple(dict(axes) for axes in inputs.values()),
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export gave no model")
    model = program.model_proto
    _strip(model)
    if top_k is not None:
        _append_top_k(model, top_k)
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if size > _INLINE_BYTES:
        onnx.save_model(
            model, os.fspath(path), save_as_external_data=True, all_tensors_to_one_file=True, location=_data_name(path)
        )
        onnx.checker.check_model(os.fspath(path))
    else:
        onnx.checker.check_model(model, full_check=True)
        Path(path).write_bytes(model.SerializeToString(deterministic=True))


def trace_onnx(
    module: nn.Module,
    example_inputs: Sequence[Tensor],
    path: str | os.PathLike[str],
    *,
    inputs: Mapping[str, Mapping[int, str]],
    outputs: Mapping[str, Mapping[int, str]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write what ``module`` does with the example inputs as ONNX: a small file, much sooner than ``export_onnx``.

    For modules that do the same with all inputs, such as a step of a stream: a choice that depends on a value, or on a
    size, stays as it was for the example. Recurrent layers become one node each. ``check_parity`` with other sizes than
    the example's shows whether it went well.

    Options:
        inputs, outputs: name -> {axis: name of the size} of the axes that vary.
        metadata: what the file says of itself.
    """
    module.eval()
    with _quiet(), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        traced = Path(folder) / "traced.onnx"
        torch.onnx.export(
            module,
            tuple(example_inputs),
            traced,
            dynamo=False,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={name: dict(axes) for name, axes in {**inputs, **outputs}.items() if axes},
        )
        model = _folded(traced)
    _write_small(model, path, metadata or {})


def quantise_onnx(source: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Write a model of float32 weights with those of its products and LSTMs in int8, values in uint8 as they come.

    The weights of each output have their own scale, largest / 127: weights that training rounded so are kept as they
    are. Metadata is kept.

    onnxruntime has no int8 for GRUs and none for convolutions that pays; they stay as they are.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(os.fspath(source))
    about = {each.key: each.value for each in model.metadata_props}
    # the constants are folded already, which is what preparing would do
    model.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    with tempfile.TemporaryDirectory() as folder:
        made = os.path.join(folder, "model.onnx")
        quantize_dynamic(
            model,
            made,
            op_types_to_quantize=["MatMul", "LSTM"],
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
        quantised = onnx.load(made)
    _make_unsigned(quantised)
    _write_small(quantised, path, about)


def check_parity(
    module: nn.Module,
    path: str | os.PathLike[str],
    batches: Iterable[Mapping[str, Tensor]],
    *,
    outputs: Sequence[str],
    tolerance: float = 1e-5,
) -> float:
    """Return the largest absolute difference between onnxruntime and PyTorch over all batches and outputs.

    ``tolerance`` is relative to the largest absolute value PyTorch gives in a batch, and absolute below 1. An infinite
    value must be the same on both sides.

    Raises:
        ParityError: a difference above the tolerance, NaN, or another shape.
        ValueError: no batch.
    """
    session = open_session(path)
    worst, checked = 0.0, False
    for batch in batches:
        checked = True
        with torch.no_grad():
            wanted = module(*batch.values())
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        fed = {name: value.numpy() for name, value in batch.items()}
        if any(each.name == "k" for each in session.get_inputs()):
            fed.setdefault("k", np.ones(1, dtype=np.int64))
        got = session.run(list(outputs), fed)
        for name, theirs, ours in zip(outputs, got, wanted, strict=True):
            difference = _difference(name, np.asarray(theirs), ours.numpy())
            limit = tolerance * max(1.0, float(np.abs(ours.numpy()).max(initial=0.0)))
            if not difference <= limit:
                raise ParityError(
                    f"{path}: output {name}: onnxruntime differs from PyTorch by {difference:.3g}, "
                    f"wanted at most {limit:.3g}"
                )
            worst = max(worst, difference)
    if not checked:
        raise ValueError("batches: got none, wanted at least one")
    return worst


def open_session(path: str | os.PathLike[str], threads: int = 1) -> onnxruntime.InferenceSession:
    """Return an onnxruntime session on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only: warnings about unused initialisers help nobody
    return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])


def _difference(name: str, theirs: np.ndarray, ours: np.ndarray) -> float:
    if theirs.shape != ours.shape:
        raise ParityError(f"output {name}: onnxruntime gives shape {theirs.shape}, PyTorch {ours.shape}")
    same = theirs == ours  # infinities agree, and inf - inf would be NaN
    with np.errstate(invalid="ignore"):
        return float(np.abs(np.where(same, 0.0, theirs - ours)).max(initial=0.0))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter says of its own insides: missing torchvision, deprecations, unused axis names."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _strip(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes about the source: stack traces hold file names of this machine."""
    graph = model.graph
    del model.metadata_props[:]
    del graph.metadata_props[:]
    for named in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del named.metadata_props[:]
        named.doc_string = ""
    for function in model.functions:
        for node in function.node:
            del node.metadata_props[:]
            node.doc_string = ""
    graph.doc_string = model.doc_string = ""
    graph.name = "main"


def _folded(path: Path) -> onnx.ModelProto:
    """Return a model of a file whose constants are worked out, products and sums left as they are."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    made = path.with_name("folded.onnx")
    options.optimized_model_filepath = os.fspath(made)
    # a Gemm in place of a product and a sum could not be quantised
    onnxruntime.InferenceSession(
        os.fspath(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=["MatMulAddFusion"]
    )
    return onnx.load(made)


# node -> the places of its int8 weights among its inputs, and those of their zero points
_INT8_INPUTS = {"MatMulInteger": ((1,), (3,)), "DynamicQuantizeLSTM": ((1, 2), (9, 11))}


def _make_unsigned(model: onnx.ModelProto) -> None:
    """Shift int8 weights by 128 to uint8, and their zero points with them, which changes no product.

    Signed weights times unsigned values are summed in pairs of 16 bits on processors with AVX2 and no VNNI, where they
    overflow: results would depend on the machine, and be worse. Unsigned times unsigned is exact everywhere.
    """
    tensors = {each.name: each for each in model.graph.initializer}
    names = {
        node.input[place]
        for node in model.graph.node
        for places in _INT8_INPUTS.get(node.op_type, ())
        for place in places
        if place < len(node.input)
    }
    for name in names:
        values = onnx.numpy_helper.to_array(tensors[name])
        if values.dtype != np.int8:
            raise TypeError(f"{name}: got {values.dtype}, wanted int8")
        tensors[name].CopyFrom(onnx.numpy_helper.from_array((values.astype(np.int16) + 128).astype(np.uint8), name))


def _write_small(model: onnx.ModelProto, path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Write a model under short names, without what is not needed to run it: of small models that is a fifth."""
    _strip(model)
    graph = model.graph
    del graph.value_info[:]
    used = {node.domain for node in graph.node}
    for place in reversed(range(len(model.opset_import))):
        if model.opset_import[place].domain not in used:
            del model.opset_import[place]
    kept = {each.name for each in (*graph.input, *graph.output)}
    names: dict[str, str] = {name: name for name in ("", *kept)}

    def short(name: str) -> str:
        return names.setdefault(name, f"v{len(names):x}")

    for tensor in graph.initializer:
        tensor.name = short(tensor.name)
    for node in graph.node:
        node.name = ""
        node.input[:] = [short(name) for name in node.input]
        node.output[:] = [short(name) for name in node.output]
    for name, value in metadata.items():
        model.metadata_props.add(key=name, value=value)
    model.producer_name, model.producer_version = "kdsuite", ""
    onnx.checker.check_model(model, full_check=True)
    Path(path).write_bytes(model.SerializeToString(deterministic=True))


def _append_top_k(model: onnx.ModelProto, scores: str) -> None:
    """Append ONNX's TopK: among equal values it takes the lower index first, which is the order wanted here."""
    graph = model.graph
    output = next((each for each in graph.output if each.name == scores), None)
    if output is None:
        raise ValueError(f"top_k: got {scores!r}, wanted one of the outputs {[each.name for each in graph.output]}")
    batch = output.type.tensor_type.shape.dim[0].dim_param or "batch"
    graph.input.append(onnx.helper.make_tensor_value_info("k", onnx.TensorProto.INT64, [1]))
    graph.node.extend(
        [
            onnx.helper.make_node("Shape", [scores], ["top_k_width"], start=1, end=2),
            onnx.helper.make_node("Min", ["k", "top_k_width"], ["top_k_count"]),
            onnx.helper.make_node(
                "TopK", [scores, "top_k_count"], ["top_scores", "top_items"], axis=1, largest=1, sorted=1
            ),
        ]
    )
    for name, kind in (("top_items", onnx.TensorProto.INT64), ("top_scores", onnx.TensorProto.FLOAT)):
        graph.output.append(onnx.helper.make_tensor_value_info(name, kind, [batch, "k_cut"]))


def _data_name(path: str | os.PathLike[str]) -> str:
    return f"{Path(path).name}.data"
