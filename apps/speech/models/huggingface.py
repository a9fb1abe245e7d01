"""CTC teachers from a local Hugging Face folder: wav2vec 2.0, HuBERT and WavLM. Nothing is downloaded, no code is run.

Weights are read from safetensors only: a pickled file can run code. Vocabularies are mapped onto our units: a token is
the symbol it equals, or else the one it equals in lower or upper case; the word delimiter is ``▁``. Tokens that are no
symbol (unknown, sentence ends, characters our units lack) count as the blank: what cannot be written is not written.

Their frames of 20 ms become ours of 40 ms in pairs: ``p = (v_a p_a + v_b p_b) / (v_a + v_b)``, v = 1 - p(blank). A
plain mean would halve each spike, every second frame alone would lose half of them. What a pair cannot keep: the order
of two symbols within it, and the one blank between two equal symbols. So lists of hypotheses are made of the frames of
20 ms (see teachers.py), and pairs teach frames.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from apps.speech.features import SAMPLE_RATE, TAIL_MS
from apps.speech.models.base import FRAME_MS
from apps.speech.models.pretrained import (
    HOP,
    MODELS,
    NO_TRANSFORMERS,
    WINDOW,
    normalises,
    read_config,
    token_groups,
    weight_files,
)
from apps.speech.view_steps import Paced
from apps.speech.views import parse_view
from kdcore.config import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from apps.speech.units import Units

HF_FRAME_MS = 1000 * HOP // SAMPLE_RATE
# attention needs memory by the square of the length
MOST_SECONDS = 120
# samples whose frame has a centre within the audio count as a feature frame
_SHIFT = 160


def longest_heard(views: Iterable[str]) -> float:
    """Return the seconds of the longest utterance that is heard at once in each of some views, its tail included."""
    faster = (math.prod(step.factor for step in parse_view(view).steps if isinstance(step, Paced)) for view in views)
    return (MOST_SECONDS - TAIL_MS / 1000) * min(faster)


class HuggingFaceCtc(nn.Module):
    """A pretrained CTC model that hears samples at 16 kHz and writes our units; made by ``from_folder``."""

    kind: ClassVar[str] = "huggingface"
    streaming: ClassVar[bool] = False
    groups: Tensor

    def __init__(self, model: PreTrainedModel, groups: Tensor, normalise: bool) -> None:
        """Take a model, the ids of its tokens that make each of our classes (int64 [C, G], -1 behind the last), and
        whether samples are brought to mean 0 and variance 1."""
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.register_buffer("groups", groups)
        self.classes, self.normalise = len(groups), normalise
        # a norm over time hears the padding: such models take utterances one at a time
        self.batches = model.config.feat_extract_norm == "layer"

    @classmethod
    def from_folder(cls, path: str | Path, units: Units) -> HuggingFaceCtc:
        """Return the teacher in a folder that ``save_pretrained`` of a model and its tokenizer wrote.

        Raises:
            UserError: no folder, a missing or malformed file, another kind of model, one without a CTC head, pickled
                weights only, or a vocabulary that misses symbols of the units (named).
        """
        folder = Path(path)
        config = read_config(folder)
        normalise = normalises(folder)
        weight_files(folder)
        rows = token_groups(folder, config, units.symbols)
        most = max(map(len, rows))
        groups = torch.tensor([row + [-1] * (most - len(row)) for row in rows])
        return cls(_load(folder, config["model_type"]), groups, normalise)

    def parameter_count(self) -> int:
        """Return the number of weights."""
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def log_probs(self, samples: np.ndarray | Tensor, frame_ms: int = FRAME_MS) -> Tensor:
        """Return log-posteriors float32 [T, C] of samples float32 [n] at 16 kHz, as many as an acoustic model gives.

        With ``frame_ms=20`` there are twice as many: the model's own frames.
        """
        return self.batch_log_probs([samples], frame_ms)[0]

    @torch.no_grad()
    def batch_log_probs(self, samples: Sequence[np.ndarray | Tensor], frame_ms: int = FRAME_MS) -> list[Tensor]:
        """Return the log-posteriors of several utterances, each as it is alone.

        Raises:
            ValueError: not float32 [n], values that are not finite, or a frame_ms other than 20 and 40.
            UserError: an utterance longer than 120 s.
        """
        if frame_ms not in (HF_FRAME_MS, FRAME_MS):
            raise ValueError(f"frame_ms: got {frame_ms}, wanted {HF_FRAME_MS} or {FRAME_MS}")
        heard = [self._prepare(each) for each in samples]
        results = [self.groups.new_zeros((0, self.classes), dtype=torch.float32) for _ in samples]
        some = [at for at, each in enumerate(heard) if len(each)]
        for batch in [some] if self.batches and some else [[at] for at in some]:
            for at, rows in zip(batch, self._run([heard[at] for at in batch]), strict=True):
                results[at] = self._ours(rows)
        return [paired(each) for each in results] if frame_ms == FRAME_MS else results

    def _prepare(self, samples: np.ndarray | Tensor) -> Tensor:
        """Return what the model hears: normalised, then silence up to whole frames of 40 ms; nothing for no frames."""
        if samples.ndim != 1 or samples.dtype not in (np.float32, torch.float32):
            raise ValueError(f"samples: wanted float32 [n], got {samples.dtype} {list(samples.shape)}")
        if len(samples) > MOST_SECONDS * SAMPLE_RATE:
            got = len(samples) / SAMPLE_RATE
            raise UserError(
                f"audio of {got:.0f} s: a Hugging Face teacher hears at most {MOST_SECONDS} s at once; cut it"
            )
        # a copy, since an array may be read-only
        wave = (samples if isinstance(samples, Tensor) else torch.tensor(samples)).to(self.groups.device)
        if not torch.isfinite(wave).all():
            raise ValueError("samples: got values that are not finite, wanted float32 in [-1, 1]")
        # as many frames as the features of this audio become
        frames = math.ceil(((len(wave) + _SHIFT // 2) // _SHIFT) / 4)
        if not frames:
            return wave[:0]
        if self.normalise:
            wave = (wave - wave.mean()) / (wave.var(correction=0) + 1e-7).sqrt()
        size = 2 * frames * HOP + WINDOW - HOP
        return nn.functional.pad(wave, (0, size - len(wave)))

    def _run(self, waves: list[Tensor]) -> list[Tensor]:
        """Return the model's logits [T, V] of each."""
        counts = [(len(wave) - WINDOW) // HOP + 1 for wave in waves]
        padded = nn.utils.rnn.pad_sequence(waves, batch_first=True)
        sizes = torch.tensor([len(wave) for wave in waves], device=padded.device)
        mask = torch.arange(padded.shape[1], device=padded.device) < sizes[:, None]
        # equal lengths need no mask, and models that norm over time were trained without one
        logits = self.model(padded, attention_mask=None if bool(mask.all()) else mask.long()).logits
        return [rows[:count].float() for rows, count in zip(logits, counts, strict=True)]

    def _ours(self, logits: Tensor) -> Tensor:
        """Return the log-posteriors [T, C] of our classes from logits [T, V] of its tokens."""
        # the column of no token, -1, is at the end
        known = nn.functional.pad(logits.log_softmax(-1), (0, 1), value=-math.inf)
        return known[:, self.groups].logsumexp(-1)


def paired(log_probs: Tensor) -> Tensor:
    """Return one frame of [T, C] for two of log-posteriors [2 T, C]: their mean by how much of each is no blank."""
    pairs = log_probs.unflatten(0, (-1, 2)) if len(log_probs) else log_probs[:, None].expand(-1, 2, -1)
    # log(1 - p(blank)), from the other classes: exact where the blank is all but certain
    spoken = pairs[..., :-1].logsumexp(-1, keepdim=True).clamp(min=-80)
    return (pairs + spoken.log_softmax(1)).logsumexp(1)


def import_transformers() -> ModuleType:
    """Return transformers with the models of ``MODELS`` at hand.

    Raises:
        UserError: transformers is not installed.
    """
    try:
        transformers = importlib.import_module("transformers")
        with _without_broken_torchaudio(transformers.utils.is_torchaudio_available):
            for names in MODELS.values():
                for name in names:
                    getattr(transformers, name)  # imported when it is first asked for
    except ModuleNotFoundError as error:
        raise UserError(f"{NO_TRANSFORMERS} ({error})") from None
    return transformers


@contextlib.contextmanager
def _without_broken_torchaudio(available: Any) -> Iterator[None]:
    """Hide a torchaudio that cannot be loaded while the models, which need nothing of it, are imported.

    transformers imports torchaudio wherever it is installed, and that of PyPI is built for CUDA: beside a torch for
    CPUs it fails. ``available`` is the cached question of transformers, which someone may have asked before.
    """
    if torch.version.cuda is not None or "torchaudio" in sys.modules:
        yield
        return
    sys.modules["torchaudio"] = None  # type: ignore[assignment]
    available.cache_clear()
    try:
        yield
    finally:
        del sys.modules["torchaudio"]
        available.cache_clear()


def _load(folder: Path, kind: str) -> PreTrainedModel:
    """Return the model with its weights, all of them from the folder."""
    transformers = import_transformers()
    config_class, model_class = (getattr(transformers, name) for name in MODELS[kind])
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = config_class.from_pretrained(folder, local_files_only=True)
        model, report = model_class.from_pretrained(
            folder, config=config, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # transformers and safetensors raise many kinds, all about what is in the files
        raise UserError(f"{folder}: the model cannot be read: {' '.join(str(error).split())[:300]}") from None
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    missing = sorted(report["missing_keys"])
    if missing:
        head = "no CTC head: " if any(name.startswith("lm_head") for name in missing) else ""
        raise UserError(f"{folder}: {head}{len(missing)} weights are missing, {missing[0]} for one")
    return model.float()
