"""One suite over every registered loss: the laws of the loss contract, and a slow obvious reference of each."""

from __future__ import annotations

import ast
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kdcore.losses
from kdcore.losses import catalogue, entries, entry, get, register
from kdcore.losses.registry import LossEntry

ROOT = Path(__file__).resolve().parents[3]
B = 6


# Slow references: one row, plain floats, written from the formulas.


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    top = max(logits)
    powers = [math.exp((x - top) / temperature) for x in logits]
    return [p / math.fsum(powers) for p in powers]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def kl(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def ref_soft_targets(
    student: list[float], teacher: list[float], temperature: float = 1.0, direction: str = "forward"
) -> float:
    q, p = softmax(student, temperature), softmax(teacher, temperature)
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    value = {
        "forward": kl(p, q),
        "reverse": kl(q, p),
        "symmetric": (kl(p, q) + kl(q, p)) / 2,
        "jensen_shannon": (kl(p, middle) + kl(q, middle)) / 2,
    }[direction]
    return temperature**2 * value


def ref_sparse(student: list[float], items: list[int], log_probs: list[float], temperature: float = 1.0) -> float:
    q, p = softmax(student, temperature), [math.exp(x) for x in log_probs]
    kept = [q[i] for i in items]
    lump = math.fsum(x for i, x in enumerate(q) if i not in items)
    return temperature**2 * kl([*p, 1 - math.fsum(p)], [*kept, lump])


def ref_regression(student: list[float], teacher: list[float], delta: float | None = None) -> float:
    errors = [abs(s - t) for s, t in zip(student, teacher, strict=True)]
    if delta is None:
        return math.fsum(e * e for e in errors) / len(errors)
    return math.fsum(e * e / 2 if e <= delta else delta * (e - delta / 2) for e in errors) / len(errors)


def ref_binary(student: list[float], teacher: list[float], temperature: float = 1.0) -> float:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        p, q = sigmoid(t / temperature), sigmoid(s / temperature)
        total += kl([p, 1 - p], [q, 1 - q])
    return temperature**2 * total


def ref_decoupled(
    student: list[float], teacher: list[float], label: int, alpha: float = 1, beta: float = 8, temperature: float = 4
) -> float:
    q, p = softmax(student, temperature), softmax(teacher, temperature)
    target = kl([p[label], 1 - p[label]], [q[label], 1 - q[label]])
    others = [i for i in range(len(p)) if i != label]
    rest = kl([p[i] / (1 - p[label]) for i in others], [q[i] / (1 - q[label]) for i in others])
    return temperature**2 * (alpha * target + beta * rest)


def ref_label_smoothing(student: list[float], label: int, smoothing: float = 0.1) -> float:
    q = softmax(student)
    target = [smoothing / len(q) + (1 - smoothing) * (i == label) for i in range(len(q))]
    return -math.fsum(t * math.log(x) for t, x in zip(target, q, strict=True))


def ref_bce(scores: list[float], targets: list[float]) -> float:
    return -math.fsum(
        y * math.log(sigmoid(s)) + (1 - y) * math.log(1 - sigmoid(s)) for s, y in zip(scores, targets, strict=True)
    )


def ref_ranking(student_list: list[float], weights: Tensor | None = None) -> float:
    importance = [1.0] * len(student_list) if weights is None else weights.tolist()
    return math.fsum(-w * math.log(sigmoid(s)) for w, s in zip(importance, student_list, strict=True))


def ref_relaxed(interesting: list[float], uninteresting: list[float]) -> float:
    total = 0.0
    for k, s in enumerate(interesting):
        total -= s - math.log(math.fsum(math.exp(x) for x in [*interesting[k:], *uninteresting]))
    return total


def ref_experts(student: list[float], teacher: list[float], temperature: float) -> float:
    module = build(entry("distillation_experts"))
    gate = [sum(w * e for w, e in zip(row, teacher, strict=True)) for row in module.gate.weight.tolist()]
    gate = [g + b for g, b in zip(gate, module.gate.bias.tolist(), strict=True)]
    z = softmax([math.log(a) for a in softmax(gate)], temperature)
    rebuilt = torch.zeros(len(teacher), dtype=torch.float64)
    width = module.hidden_dim
    for m, share in enumerate(z):
        first = module.first.weight[m * width : (m + 1) * width] @ torch.tensor(student, dtype=torch.float64)
        hidden = (first + module.first.bias[m * width : (m + 1) * width]).clamp(min=0)
        rebuilt += share * (hidden @ module.second[m] + module.second_bias[m]).detach()
    return float(((torch.tensor(teacher, dtype=torch.float64) - rebuilt) ** 2).sum())


REFERENCES: dict[str, Callable[..., float]] = {
    "soft_targets": ref_soft_targets,
    "sparse_soft_targets": ref_sparse,
    "logit_mse": ref_regression,
    "regression": ref_regression,
    "binary_soft_targets": ref_binary,
    "decoupled": ref_decoupled,
    "label_smoothing": ref_label_smoothing,
    "confidence_penalty": lambda s: math.log(len(s)) + math.fsum(p * math.log(p) for p in softmax(s)),
    "bpr": lambda p, n: math.fsum(-math.log(sigmoid(p - x)) for x in n) / len(n),
    "pointwise_bce": ref_bce,
    "ranking_distillation": ref_ranking,
    "collaborative_distillation": lambda s, t: ref_bce(s, [sigmoid(x) for x in t]),
    "relaxed_ranking": ref_relaxed,
    "distillation_experts": ref_experts,
}


# How the suite calls a loss.


def build(row: LossEntry, dtype: torch.dtype = torch.float64) -> Any:
    loss = row.build()
    return loss.to(dtype) if isinstance(loss, nn.Module) else loss


def examples(row: LossEntry, rows: int = B, seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    inputs = row.examples(rows, torch.Generator().manual_seed(seed))
    fixed = ("labels", "teacher_log_probs")  # not on the scale of logits
    return {k: v * scale if v.is_floating_point() and k not in fixed else v for k, v in inputs.items()}


def trainable(row: LossEntry, inputs: Mapping[str, Tensor]) -> list[str]:
    return [k for k, v in inputs.items() if v.is_floating_point() and k not in row.teacher]


def with_gradient(row: LossEntry, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = trainable(row, inputs)
    return {k: v.clone().requires_grad_() if k in names else v for k, v in inputs.items()}


CASES = [pytest.param(row, v, id=f"{row.name}-{i}") for row in entries() for i, v in enumerate(row.variants)]
cases = pytest.mark.parametrize(("row", "options"), CASES)
Options = Mapping[str, Any]


def claiming(law: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("row", "options"), [c for c in CASES if law in c.values[0].laws])


def test_every_registered_loss_has_a_reference() -> None:
    assert {row.name for row in entries()} == set(REFERENCES)


@cases
def test_agrees_with_the_reference(row: LossEntry, options: Options) -> None:
    inputs = examples(row)
    got = build(row)(**inputs, **options, reduction="none")
    want = [REFERENCES[row.name](*(v[b].tolist() for v in inputs.values()), **options) for b in range(B)]
    assert got.tolist() == pytest.approx(want, rel=1e-9, abs=1e-12)


@cases
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_finite_differences(row: LossEntry, options: Options, reduction: str) -> None:
    inputs = with_gradient(row, examples(row, rows=3))
    names = trainable(row, inputs)
    loss = build(row)

    def function(*values: Tensor) -> Tensor:
        return loss(**{**inputs, **dict(zip(names, values, strict=True))}, **options, reduction=reduction)

    assert names
    assert torch.autograd.gradcheck(function, tuple(inputs[n] for n in names))


@cases
def test_reductions(row: LossEntry, options: Options) -> None:
    inputs, loss = examples(row), build(row)
    each = loss(**inputs, **options, reduction="none")
    assert each.shape == (B,)
    for reduction, want in (("sum", each.sum()), ("mean", each.mean())):
        got = loss(**inputs, **options, reduction=reduction)
        assert got.shape == ()
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(loss(**inputs, **options), each.mean())


@cases
def test_no_gradient_in_the_teacher(row: LossEntry, options: Options) -> None:
    inputs = {k: v.requires_grad_(v.is_floating_point()) for k, v in examples(row).items()}
    build(row)(**inputs, **options).backward()
    for name, values in inputs.items():
        if values.is_floating_point():
            assert (values.grad is None) == (name in row.teacher), name


@cases
def test_masked_equals_dropped_rows(row: LossEntry, options: Options) -> None:
    mask = torch.tensor([True, False, True, True, False, True])
    inputs = examples(row)
    dropped = with_gradient(row, {k: v[mask] for k, v in inputs.items()})
    poisoned = {
        k: v.masked_fill(~mask.view(-1, *(1,) * (v.dim() - 1)), torch.nan if v.is_floating_point() else -100)
        for k, v in inputs.items()
    }
    masked = with_gradient(row, poisoned)
    loss = build(row)
    for reduction in ("sum", "mean"):
        got = loss(**masked, **options, mask=mask, reduction=reduction)
        want = loss(**dropped, **options, reduction=reduction)
        torch.testing.assert_close(got, want)
        names = trainable(row, inputs)
        got_gradients = torch.autograd.grad(got, [masked[n] for n in names])
        want_gradients = torch.autograd.grad(want, [dropped[n] for n in names])
        for a, b in zip(got_gradients, want_gradients, strict=True):
            torch.testing.assert_close(a[mask], b)
            assert torch.equal(a[~mask], torch.zeros_like(a[~mask]))
    assert torch.equal(loss(**masked, **options, mask=mask, reduction="none") == 0, ~mask)


@cases
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_nothing_valid_is_a_zero_with_a_graph(row: LossEntry, options: Options, reduction: str) -> None:
    for rows, mask in ((B, torch.zeros(B, dtype=torch.bool)), (0, None)):
        inputs = with_gradient(row, examples(row, rows=rows))
        value = build(row)(**inputs, **options, mask=mask, reduction=reduction)
        assert value.shape == () and value.item() == 0
        value.backward()
        for name in trainable(row, inputs):
            assert torch.equal(inputs[name].grad, torch.zeros_like(inputs[name]))


@claiming("element_mask")
def test_masked_elements_equal_dropped_elements(row: LossEntry, options: Options) -> None:
    inputs = examples(row)
    shape = next(iter(inputs.values())).shape
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[0], mask[1] = False, True
    listed = [k for k, v in inputs.items() if v.shape == shape]
    masked = with_gradient(row, {k: v.masked_fill(~mask, torch.nan) if k in listed else v for k, v in inputs.items()})
    loss = build(row)
    got = loss(**masked, **options, mask=mask, reduction="none")
    got.sum().backward()
    for b in range(B):
        keep = mask[b]
        single = with_gradient(row, {k: v[b : b + 1, keep] if k in listed else v[b : b + 1] for k, v in inputs.items()})
        kept = {k: v[keep] if isinstance(v, Tensor) else v for k, v in options.items()}
        want = loss(**single, **kept, reduction="none") if keep.any() else torch.zeros(1, dtype=torch.float64)
        torch.testing.assert_close(got[b : b + 1], want)
        if keep.any():
            want.sum().backward()
            for name in trainable(row, inputs):
                gradient = masked[name].grad[b]
                torch.testing.assert_close(gradient[keep] if name in listed else gradient, single[name].grad[0])
    rows = mask.any(1)
    torch.testing.assert_close(loss(**masked, **options, mask=mask), got[rows].mean())


@cases
def test_finite_at_logits_times_1000(row: LossEntry, options: Options) -> None:
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in examples(row, scale=1000.0).items()}
    inputs = with_gradient(row, inputs)
    value = build(row, torch.float32)(**inputs, **options)
    value.backward()
    assert value.isfinite()
    assert all(inputs[n].grad.isfinite().all() for n in trainable(row, inputs))


@cases
def test_batch_of_one_and_duplicate_rows(row: LossEntry, options: Options) -> None:
    one = examples(row, rows=1)
    twice = {k: v.repeat(3, *(1,) * (v.dim() - 1)) for k, v in one.items()}
    loss = build(row)
    single = loss(**one, **options)
    assert single.isfinite()
    torch.testing.assert_close(loss(**twice, **options), single)
    torch.testing.assert_close(loss(**twice, **options, reduction="none"), single.expand(3))


@cases
def test_permuted_rows_give_permuted_losses(row: LossEntry, options: Options) -> None:
    order = torch.randperm(B, generator=torch.Generator().manual_seed(1))
    inputs, loss = examples(row), build(row)
    got = loss(**{k: v[order] for k, v in inputs.items()}, **options, reduction="none")
    torch.testing.assert_close(got, loss(**inputs, **options, reduction="none")[order])


@cases
def test_bfloat16_is_worked_on_in_float32(row: LossEntry, options: Options) -> None:
    low = {k: v.bfloat16() if v.is_floating_point() else v for k, v in examples(row).items()}
    exact = {k: v.double() if v.is_floating_point() else v for k, v in low.items()}
    want = build(row)(**exact, **options).item()
    inputs = with_gradient(row, low)
    value = build(row, torch.float32)(**inputs, **options)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(want, rel=1e-5)
    value.backward()
    assert all(inputs[n].grad.dtype == torch.bfloat16 for n in trainable(row, inputs))


@cases
def test_autocast_changes_nothing(row: LossEntry, options: Options) -> None:
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in examples(row).items()}
    loss = build(row, torch.float32)
    want = loss(**inputs, **options).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(**inputs, **options)
    assert value.dtype == torch.float32
    # A loss with parameters is a network, whose matrix products autocast is meant to lower.
    assert value.item() == pytest.approx(want, rel=2e-2 if isinstance(loss, nn.Module) else 1e-6)


@claiming("chunked")
@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_chunked_equals_unchunked(row: LossEntry, options: Options, chunk_size: int) -> None:
    mask = torch.tensor([True, True, False, True, True, False])
    whole, parts, loss = with_gradient(row, examples(row)), with_gradient(row, examples(row)), build(row)
    for reduction in ("none", "mean"):
        want = loss(**whole, **options, mask=mask, reduction=reduction)
        got = loss(**parts, **options, mask=mask, reduction=reduction, chunk_size=chunk_size)
        torch.testing.assert_close(got, want)
        want.sum().backward()
        got.sum().backward()
    for name in trainable(row, whole):
        torch.testing.assert_close(parts[name].grad, whole[name].grad)


# The laws a loss claims, on any scores.

seeds = st.integers(0, 2**31)
scales = st.floats(0.01, 30)
laws_settings = settings(max_examples=15, deadline=None)


@claiming("zero_at_equality")
@given(seed=seeds, scale=scales)
@laws_settings
def test_zero_at_equality(row: LossEntry, options: Options, seed: int, scale: float) -> None:
    inputs = row.at_equality(examples(row, seed=seed, scale=scale), options)
    got = build(row)(**inputs, **options, reduction="none")
    torch.testing.assert_close(got, torch.zeros(B, dtype=torch.float64), rtol=0, atol=1e-12)


def comparable(row: LossEntry) -> bool:
    inputs = examples(row)
    return "teacher" in inputs and inputs["student"].shape == inputs["teacher"].shape


@pytest.mark.parametrize(("row", "options"), [c for c in CASES if comparable(c.values[0])])
def test_only_the_claimed_losses_are_zero_at_equality(row: LossEntry, options: Options) -> None:
    inputs = row.at_equality(examples(row), options)
    value = build(row)(**inputs, **options).item()
    assert (abs(value) < 1e-12) == ("zero_at_equality" in row.laws)


@claiming("stationary_at_equality")
@given(seed=seeds, scale=scales)
@laws_settings
def test_stationary_at_equality(row: LossEntry, options: Options, seed: int, scale: float) -> None:
    inputs = with_gradient(row, row.at_equality(examples(row, seed=seed, scale=scale), options))
    build(row)(**inputs, **options, reduction="sum").backward()
    gradient = inputs["student"].grad
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-11)


@claiming("nonnegative")
@given(seed=seeds, scale=scales)
@laws_settings
def test_nonnegative(row: LossEntry, options: Options, seed: int, scale: float) -> None:
    got = build(row)(**examples(row, seed=seed, scale=scale), **options, reduction="none")
    assert (got >= -1e-12).all()


@pytest.mark.parametrize("side", ["student_shift", "teacher_shift"])
@given(seed=seeds, shift=st.floats(-50, 50))
@laws_settings
def test_shift_invariance(side: str, seed: int, shift: float) -> None:
    for row in (r for r in entries() if side in r.laws):
        inputs, loss = examples(row, seed=seed), build(row)
        names = trainable(row, inputs) if side == "student_shift" else row.teacher
        rows = shift * torch.linspace(-1, 1, B, dtype=torch.float64)
        moved = {k: v + rows.view(-1, *(1,) * (v.dim() - 1)) if k in names else v for k, v in inputs.items()}
        for options in row.variants:
            got = loss(**moved, **options, reduction="none")
            want = loss(**inputs, **options, reduction="none")
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@claiming("symmetric")
def test_student_and_teacher_may_be_swapped(row: LossEntry, options: Options) -> None:
    inputs, loss = examples(row), build(row)
    swapped = {**inputs, "student": inputs["teacher"], "teacher": inputs["student"]}
    torch.testing.assert_close(loss(**swapped, **options), loss(**inputs, **options))


@claiming("permutation")
def test_permuted_classes_change_nothing(row: LossEntry, options: Options) -> None:
    inputs, loss = examples(row), build(row)
    width = next(iter(inputs.values())).shape[-1]
    order = torch.randperm(width, generator=torch.Generator().manual_seed(5))
    moved = {k: v[:, order] for k, v in inputs.items()}
    torch.testing.assert_close(loss(**moved, **options), loss(**inputs, **options))


# What a user gets wrong.


@cases
def test_bad_mask_and_reduction_are_named(row: LossEntry, options: Options) -> None:
    inputs, loss = examples(row), build(row)
    with pytest.raises(ValueError, match=r"reduction: wanted one of none, mean, sum, got 'average'"):
        loss(**inputs, **options, reduction="average")
    with pytest.raises(ValueError, match=r"mask: wanted torch.bool, got torch.float32"):
        loss(**inputs, **options, mask=torch.ones(B))
    with pytest.raises(ValueError, match=r"mask: wanted shape .*6.*, got \(7,\)"):
        loss(**inputs, **options, mask=torch.ones(B + 1, dtype=torch.bool))


@pytest.mark.parametrize("row", entries(), ids=lambda row: row.name)
def test_wrong_inputs_are_named(row: LossEntry) -> None:
    inputs, loss, options = examples(row), build(row), row.variants[0]
    for name, values in inputs.items():
        with pytest.raises(ValueError, match=r"wanted .*got"):
            loss(**{**inputs, name: values[..., None, None]}, **options)
        if values.is_floating_point():
            with pytest.raises(ValueError, match=f"{name}: wanted a floating dtype, got torch.int64"):
                loss(**{**inputs, name: values.long()}, **options)
        if len(inputs) > 1:
            with pytest.raises(ValueError, match=r"wanted .*got"):
                loss(**{**inputs, name: values[1:]}, **options)


@pytest.mark.parametrize("row", entries(), ids=lambda row: row.name)
def test_options_are_keyword_only_and_documented(row: LossEntry) -> None:
    loss = row.build()
    function = loss.forward if isinstance(loss, nn.Module) else loss
    parameters = inspect.signature(function).parameters
    inputs = list(examples(row))
    assert list(parameters)[: len(inputs)] == inputs
    options = list(parameters.values())[len(inputs) :]
    assert {"mask", "reduction"} <= {p.name for p in options}
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in options)
    text = f"{row.function.__doc__}\n{function.__doc__}"
    assert all(part in text for part in ("Shapes:", "Raises:", "Reference:", *inputs))


# The registry and the catalogue.


def test_names_are_found_and_misspelt_ones_get_a_hint() -> None:
    assert get("soft_targets") is kdcore.losses.soft_targets
    assert entry("distillation_experts").function is kdcore.losses.DistillationExperts
    with pytest.raises(ValueError, match=r"unknown name 'soft_target'; did you mean soft_targets"):
        get("soft_target")
    with pytest.raises(ValueError, match=r"unknown name 'zzz'; known: binary_soft_targets, bpr"):
        get("zzz")


def test_duplicates_and_unknown_laws_are_refused() -> None:
    row = entry("bpr")
    before = entries()
    with pytest.raises(ValueError, match=r"'bpr' is registered already, by kdcore.losses.ranking"):
        register("bpr", "ranking", "someone", examples=row.examples)(lambda: None)
    with pytest.raises(ValueError, match=r"laws: wanted some of zero_at_equality.*, got always_right"):
        register("new", "ranking", "someone", examples=row.examples, laws=("always_right",))(lambda: None)
    assert entries() == before


def test_families() -> None:
    assert {row.family for row in entries()} >= {"response", "ranking"}
    assert next(row.name for row in entries("response")) == "soft_targets"
    assert entries("no such family") == ()


def test_catalogue_on_disk_is_in_step() -> None:
    text = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    assert text == catalogue(), "run: python -m kdcore.losses > docs/losses.md"
    assert all(f"| `{row.function.__name__}` |" in text for row in entries())


def test_losses_import_torch_only() -> None:
    folder = Path(kdcore.losses.__file__).parent
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                modules = [node.module or ""]
            for module in modules:
                top = module.split(".")[0]
                allowed = top == "torch" or top in sys.stdlib_module_names or module.startswith("kdcore.losses")
                assert allowed, f"{path.name} imports {module}"
