"""On a GPU, where there is one: models are trained and teachers asked there, and what is stored is read by a CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from apps.speech.augment import Augment
from apps.speech.config import recipe_names
from apps.speech.features import FEATURES
from apps.speech.fitting import ask
from apps.speech.models.store import load_model
from data_scripts.simulate_speech import simulate
from tests.speech.small_runs import small

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_run_on_a_gpu_teaches_there_and_stores_what_a_cpu_reads(recipe: str, tmp_path: Path) -> None:
    pipeline = small(recipe, simulate(tmp_path / "data", utterances=36), tmp_path)
    torch.cuda.reset_peak_memory_stats()
    pipeline.distill(0)
    assert torch.cuda.max_memory_allocated() > 1 << 20
    model, _ = load_model(pipeline.run.path / "seeds" / "0" / "student")
    assert model.head.weight.device.type == "cpu"
    teacher, prepared = pipeline.teach(0), pipeline.prepared
    on_cpu = teacher.ask(prepared, "train", "clean", range(3), attention=True)
    teacher.to(torch.device("cuda"))
    on_gpu = teacher.ask(prepared, "train", "clean", range(3), attention=True)
    assert on_cpu.keys() == on_gpu.keys()
    for name, values in on_cpu.items():
        for one, other in zip(values, on_gpu[name], strict=True):
            np.testing.assert_allclose(np.exp(one), np.exp(other), atol=2e-3)
    store = prepared.store("train", "clean")
    said = ask(model, [store[0]])["log_probs"][0]
    np.testing.assert_allclose(ask(model.cuda(), [store[0]])["log_probs"][0], said, atol=2e-2)


def test_what_is_hidden_does_not_depend_on_the_device() -> None:
    features, lengths, fill = torch.randn(3, 120, FEATURES), torch.tensor([120, 90, 30]), torch.zeros(FEATURES)
    torch.manual_seed(0)
    on_cpu = Augment(warp=0.1, level=3, tilt=3)(features, lengths, fill)
    torch.manual_seed(0)
    on_gpu = Augment(warp=0.1, level=3, tilt=3)(features.cuda(), lengths.cuda(), fill.cuda())
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-4, rtol=1e-4)
