"""Students that learn while they feel the rounding of their int8 weights and activations."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn

from kdcore.config import UserError
from kdcore.teaching.registry import teaching


def _torchao() -> tuple[Any, Any]:
    """Return torchao's export quantisation and its x86 quantiser; seconds to import, so only when asked for."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.quantization import pt2e
            from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer
    except ImportError:
        raise UserError("quantisation-aware teaching needs torchao: pip install 'kdsuite[quantise]'") from None
    return pt2e, x86_inductor_quantizer


@teaching(
    "quantisation_aware",
    "function",
    "a student that torch.export takes; example inputs; then any step",
    "Mishra & Marr, Apprentice, ICLR 2018; Kim et al., QKD: Quantization-aware Knowledge Distillation, 2019",
)
def prepare_quantised(student: nn.Module, example: Tensor) -> nn.Module:
    """Return a copy of a student that rounds as its int8 form will, for any step to teach; any batch size from 2 on.

    Weights are rounded per channel, activations per tensor with learned ranges (torchao on the exported graph); batch
    norms are folded. Teach it like any student, then ``convert_quantised``.

    Raises:
        UserError: torchao is missing.
        ValueError: fewer than 2 example rows.
    """
    pt2e, x86 = _torchao()
    if len(example) < 2:
        raise ValueError(f"example: wanted at least 2 rows, got {len(example)}")
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    mode = student.training
    rows = torch.export.Dim("rows", min=1)
    exported = torch.export.export(student.train(), (example,), dynamic_shapes=({0: rows},)).module()
    student.train(mode)
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    prepared = prepare_qat_pt2e(exported, quantizer)
    pt2e.allow_exported_model_train_eval(prepared)
    ready: nn.Module = prepared.train()
    return ready


def convert_quantised(prepared: nn.Module) -> nn.Module:
    """Return the int8 form of a student made by prepare_quantised, for inference."""
    pt2e, _ = _torchao()
    import copy

    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    twin = copy.deepcopy(prepared)
    pt2e.move_exported_model_to_eval(twin)
    converted: nn.Module = convert_pt2e(twin)
    pt2e.allow_exported_model_train_eval(converted)
    return converted


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of the tensors a model computes with: what its graph reads, or all its state."""
    if not isinstance(model, fx.GraphModule):
        return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    total = 0
    for target in {str(node.target) for node in model.graph.nodes if node.op == "get_attr"}:
        value: Any = model
        for name in target.split("."):
            value = getattr(value, name)
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
    return total
