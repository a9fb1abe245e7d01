"""Students that learn while they feel the rounding of their int8 weights, and of activations where they can."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from kdcore.config import UserError
from kdcore.teaching.registry import teaching


def _torchao() -> tuple[Any, Any]:
    """Return torchao's export quantisation and its x86 quantiser; seconds to import, so only when asked for."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.quantization.pt2e import quantize_pt2e
            from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer
    except ImportError:
        raise UserError("quantisation-aware teaching needs torchao: pip install 'kdsuite[quantise]'") from None
    return quantize_pt2e, x86_inductor_quantizer


class ExportedStudent(nn.Module):
    """A student on an exported graph, which changes between training and evaluation as any other does.

    An exported graph has the mode it was exported in written into its operations. torchao's own way to change it takes
    seconds, and gives every dropout and batch norm the default rate, momentum and eps. In evaluation the ranges of
    activations stand still as well.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph
        # torchao takes a plain dictionary of weights for one of an old version, and puts its default for every eps
        self._read_eps: dict[str, Tensor] = {}
        self.register_load_state_dict_pre_hook(_read_eps)
        self.register_load_state_dict_post_hook(_write_eps)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the student's answer."""
        answer: Tensor = self.graph(inputs)
        return answer

    def train(self, mode: bool = True) -> ExportedStudent:
        """Set the mode: dropout, batch norms, and whether ranges are observed."""
        changed = [_set_training(node, mode) for node in self.graph.graph.nodes]
        if any(changed):
            self.graph.recompile()
        for module in self.modules():
            module.training = mode
        self.observe(mode)
        return self

    def observe(self, enabled: bool) -> None:
        """Let the ranges of activations follow the data, or not."""
        for module in self.modules():
            if callable(switch := getattr(module, "enable_observer", None)):
                switch(enabled)


def _read_eps(module: Any, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    names = [name for name, _ in module.named_buffers() if name.endswith(".eps") and prefix + name in state]
    module._read_eps = {name: state[prefix + name].clone() for name in names}


def _write_eps(module: Any, keys: Any) -> None:
    for name, value in module._read_eps.items():
        module.get_buffer(name).copy_(value)


def _set_training(node: fx.Node, mode: bool) -> bool:
    """Write a mode into an operation that has one (dropout, batch norm); return whether it had the other."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return False
    for place, argument in enumerate(schema.arguments):
        if argument.name in ("train", "training") and place < len(node.args) and node.args[place] is not mode:
            node.update_arg(place, mode)
            return True
    return False


@teaching(
    "quantisation_aware",
    "function",
    "a student that torch.export takes; example inputs; then any step",
    "Mishra & Marr, Apprentice, ICLR 2018; Kim et al., QKD: Quantization-aware Knowledge Distillation, 2019",
)
def prepare_quantised(student: nn.Module, example: Tensor) -> ExportedStudent:
    """Return a copy of a student that rounds as its int8 form will, for any step to teach; any batch size from 2 on.

    Weights are rounded per channel, activations per tensor with ranges that follow the data and begin with those of
    the example (torchao on the exported graph); a batch norm after a convolution is folded into it. Teach it like any
    student, then ``convert_quantised``.

    Raises:
        UserError: torchao is missing.
        ValueError: fewer than 2 example rows.
    """
    pt2e, x86 = _torchao()
    if len(example) < 2:
        raise ValueError(f"example: wanted at least 2 rows, got {len(example)}")
    rows = torch.export.Dim("rows", min=1)
    twin = copy.deepcopy(student).train()  # a graph shares the weights of what it was exported from
    exported = torch.export.export(twin, (example,), dynamic_shapes=({0: rows},)).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    prepared = ExportedStudent(pt2e.prepare_qat_pt2e(exported, quantizer))
    prepared.eval().observe(True)
    with torch.no_grad():
        prepared(example)
    return prepared.train()


def convert_quantised(prepared: ExportedStudent) -> ExportedStudent:
    """Return the int8 form of a student made by prepare_quantised, for inference."""
    pt2e, _ = _torchao()
    twin = copy.deepcopy(prepared).eval()
    return ExportedStudent(pt2e.convert_pt2e(twin.graph)).eval()


# layers whose matrices int8 runtimes quantise by rows: outputs of a linear layer, gates of a recurrent one, channels
_ROUNDED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LSTM, nn.GRU)
_LARGEST = 127


class RoundedWeight(nn.Module):
    """A weight [R, ...] as int8 holds it: in each row whole multiples of largest / 127.

    Gradients pass straight through. Evaluation always rounds, training while ``active``, which checkpoints hold.
    """

    active: Tensor

    def __init__(self, active: bool) -> None:
        super().__init__()
        self.register_buffer("active", torch.tensor(active))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight, rounded or as it is."""
        if self.training and not self.active:
            return weight
        largest = weight.detach().abs().flatten(1).amax(1)
        steps = (largest / _LARGEST).clamp(min=torch.finfo(weight.dtype).tiny)
        zeros = torch.zeros(len(steps), dtype=torch.int32, device=weight.device)
        return torch.fake_quantize_per_channel_affine(weight, steps, zeros, 0, -_LARGEST, _LARGEST)


def round_weights(student: nn.Module, *, active: bool = True) -> int:
    """Make a student compute with int8 weights while it learns, for any step to teach; return how many are rounded.

    Unlike ``prepare_quantised`` it takes any student (several inputs, recurrent layers, hooks), changes it in place and
    leaves activations alone: this is what runtimes with dynamic quantisation round. The matrices of linear,
    convolution, LSTM and GRU layers are rounded by rows (torch's fake quantisation), biases and norms are not.
    Afterwards ``keep_rounded``.

    Options: with ``active`` off only evaluation rounds, until ``set_rounding``: so the weights that validate best are
    the best as int8 from the first epoch on.

    Reference: Shi et al., Interspeech 2019 (quantised distillation).
    """
    count = 0
    for module in list(student.modules()):
        if isinstance(module, _ROUNDED) and not parametrize.is_parametrized(module):
            for name, value in list(module.named_parameters(recurse=False)):
                if value.ndim > 1:
                    parametrize.register_parametrization(module, name, RoundedWeight(active), unsafe=True)
                    count += 1
    return count


def set_rounding(student: nn.Module, active: bool) -> None:
    """Let the weights of ``round_weights`` be rounded in training too, or not."""
    for module in student.modules():
        if isinstance(module, RoundedWeight):
            module.active.fill_(active)


def keep_rounded(student: nn.Module) -> None:
    """Put rounded weights in the place of those that ``round_weights`` rounds: a plain model, on the int8 grid."""
    set_rounding(student, True)
    for module in list(student.modules()):
        if isinstance(module, _ROUNDED) and parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of the tensors a model computes with: what its graph reads, or all its state."""
    if not isinstance(model, ExportedStudent):
        return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    total = 0
    for target in {str(node.target) for node in model.graph.graph.nodes if node.op == "get_attr"}:
        value: Any = model.graph
        for name in target.split("."):
            value = getattr(value, name)
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
    return total
