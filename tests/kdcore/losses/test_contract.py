"""One suite over every registered loss: the laws of the loss contract, and a slow obvious reference of each."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Mapping
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
from tests.kdcore.losses.references import REFERENCES

ROOT = Path(__file__).resolve().parents[3]
B = 6


# How the suite calls a loss.


def build(row: LossEntry, dtype: torch.dtype = torch.float64) -> Any:
    loss = row.build()
    return loss.to(dtype) if isinstance(loss, nn.Module) else loss


def examples(row: LossEntry, rows: int = B, seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    inputs = row.examples(rows, torch.Generator().manual_seed(seed))
    return {k: v * scale if v.is_floating_point() and k not in row.fixed else v for k, v in inputs.items()}


def trainable(row: LossEntry, inputs: Mapping[str, Tensor]) -> list[str]:
    return [k for k, v in inputs.items() if v.is_floating_point() and k not in row.teacher]


def with_gradient(row: LossEntry, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = trainable(row, inputs)
    return {k: v.clone().requires_grad_() if k in names else v for k, v in inputs.items()}


def finite(row: LossEntry, loss: Any, inputs: Mapping[str, Tensor], options: Mapping[str, Any]) -> None:
    """Assert that value and gradients are finite."""
    inputs = with_gradient(row, inputs)
    value = loss(**inputs, **options)
    value.backward()
    assert value.isfinite()
    assert all(inputs[n].grad.isfinite().all() for n in trainable(row, inputs))


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
    reference = REFERENCES[row.name]
    if row.batchwise:
        want = list(reference(*(v.tolist() for v in inputs.values()), **options))
    else:
        want = [reference(*(v[b].tolist() for v in inputs.values()), **options) for b in range(B)]
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
    finite(row, build(row, torch.float32), inputs, options)


@cases
def test_batch_of_one_and_duplicate_rows(row: LossEntry, options: Options) -> None:
    one = examples(row, rows=1)
    twice = {k: v.repeat(3, *(1,) * (v.dim() - 1)) for k, v in one.items()}
    loss = build(row)
    for inputs in (one, twice):
        finite(row, loss, inputs, options)
    if not row.batchwise:
        single = loss(**one, **options)
        torch.testing.assert_close(loss(**twice, **options), single)
        torch.testing.assert_close(loss(**twice, **options, reduction="none"), single.expand(3))


@cases
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_finite_at_zero_features(row: LossEntry, options: Options, side: str) -> None:
    inputs = examples(row)
    zeroed = {
        "student": trainable(row, inputs),
        "teacher": [n for n in row.teacher if n not in row.fixed],
        "both": [n for n, v in inputs.items() if v.is_floating_point() and n not in row.fixed],
    }[side]
    finite(row, build(row), {k: torch.zeros_like(v) if k in zeroed else v for k, v in inputs.items()}, options)


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


# tracing takes a second each: the first set of options stands for the others
@pytest.mark.parametrize(("row", "options"), [c for c in CASES if c.id.endswith("-0")])
def test_compiled_equals_eager(row: LossEntry, options: Options) -> None:
    inputs, loss = examples(row), build(row)
    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager")
    plain, traced = with_gradient(row, inputs), with_gradient(row, inputs)
    want, got = loss(**plain, **options), compiled(**traced, **options)
    torch.testing.assert_close(got, want)
    want.backward()
    got.backward()
    for name in trainable(row, inputs):
        torch.testing.assert_close(traced[name].grad, plain[name].grad)


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


@claiming("student_scale")
@given(seed=seeds, scale=st.floats(0.1, 10))
@laws_settings
def test_scaled_students_change_nothing(row: LossEntry, options: Options, seed: int, scale: float) -> None:
    inputs, loss = examples(row, seed=seed), build(row)
    moved = {**inputs, "student": inputs["student"] * scale}
    torch.testing.assert_close(
        loss(**moved, **options, reduction="none"), loss(**inputs, **options, reduction="none"), rtol=1e-9, atol=1e-10
    )


@claiming("translation")
@given(seed=seeds, size=st.floats(0.1, 30))
@laws_settings
def test_translated_students_change_nothing(row: LossEntry, options: Options, seed: int, size: float) -> None:
    inputs, loss = examples(row, seed=seed), build(row)
    vector = size * torch.linspace(-1, 1, inputs["student"][0].numel(), dtype=torch.float64)
    moved = {**inputs, "student": inputs["student"] + vector.view(inputs["student"][0].shape)}
    torch.testing.assert_close(
        loss(**moved, **options, reduction="none"), loss(**inputs, **options, reduction="none"), rtol=1e-8, atol=1e-9
    )


@claiming("rotation")
@given(seed=seeds)
@laws_settings
def test_rotated_students_change_nothing(row: LossEntry, options: Options, seed: int) -> None:
    inputs, loss = examples(row, seed=seed), build(row)
    width = inputs["student"].shape[-1]
    draw = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moved = {**inputs, "student": inputs["student"] @ torch.linalg.qr(draw).Q}
    torch.testing.assert_close(
        loss(**moved, **options, reduction="none"), loss(**inputs, **options, reduction="none"), rtol=1e-8, atol=1e-9
    )


@claiming("padding")
def test_padding_changes_nothing(row: LossEntry, options: Options) -> None:
    inputs, loss = examples(row), build(row)
    plain = with_gradient(row, inputs)
    longer = {}
    for name, values in inputs.items():
        if values.dim() < 2:
            longer[name] = values
            continue
        lengths = inputs["teacher_lengths" if name in row.teacher and "teacher_lengths" in inputs else "lengths"]
        junk = torch.nan if values.is_floating_point() else -100
        padded = torch.cat([values, torch.full_like(values[:, :3], junk)], 1)
        if values.is_floating_point():
            beyond = torch.arange(padded.shape[1]) >= lengths[:, None]
            padded = padded.masked_fill(beyond.view(*beyond.shape, *(1,) * (values.dim() - 2)), junk)
        longer[name] = padded
    padded = with_gradient(row, longer)
    want, got = loss(**plain, **options), loss(**padded, **options)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    want.backward()
    got.backward()
    for name in trainable(row, inputs):
        gradient = padded[name].grad
        torch.testing.assert_close(gradient[:, : inputs[name].shape[1]], plain[name].grad)
        assert torch.equal(gradient[:, inputs[name].shape[1] :], torch.zeros_like(gradient[:, inputs[name].shape[1] :]))


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
    moved = {k: v[..., order] for k, v in inputs.items()}
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
    with pytest.raises(ValueError, match=r"unknown name 'soft_target'; the nearest are soft_targets, \w+, \w+$"):
        get("soft_target")


def test_duplicates_and_unknown_laws_are_refused() -> None:
    row = entry("bpr")
    before = entries()
    with pytest.raises(ValueError, match=r"name: the loss 'bpr' is registered already"):
        register("bpr", "ranking", "someone", examples=row.examples)(lambda: None)
    with pytest.raises(ValueError, match=r"laws: wanted some of zero_at_equality.*, got always_right"):
        register("new", "ranking", "someone", examples=row.examples, laws=("always_right",))(lambda: None)
    with pytest.raises(ValueError, match=r"family: wanted some of response, .*, got magic"):
        register("new", "magic", "someone", examples=row.examples)(lambda: None)
    assert entries() == before


def test_families() -> None:
    assert {row.family for row in entries()} >= {"response", "ranking"}
    assert next(row.name for row in entries("response")) == "soft_targets"
    described = entry("distillation_experts").describe()
    assert (described["form"], described["needs"]) == ("module", ["student", "teacher"])
    assert entry("decoupled").describe()["needs"] == ["student", "teacher", "labels"]
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
