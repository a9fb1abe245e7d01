"""Hugging Face teachers: small random checkpoints of three kinds, saved to disk and read back."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.speech.features import SAMPLE_RATE, fbank, with_tail
from apps.speech.models.base import output_lengths
from apps.speech.models.huggingface import MODELS, HuggingFaceCtc, import_transformers, longest_heard, paired
from apps.speech.units import Units
from kdcore.config import UserError

UNITS = Units(("▁", "a", "b", "c"))
# upper case, a delimiter, sentence ends, a letter that the units lack and one in both cases
VOCABULARY = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "B": 5, "A": 6, "C": 7, "Z": 8, "a": 9}
SIZES = {
    "vocab_size": 12,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "pad_token_id": 0,
}


def save(folder: Path, kind: str = "wav2vec2", norm: str = "layer", **options: object) -> Path:
    transformers = import_transformers()
    torch.manual_seed(0)
    config_class, model_class = (getattr(transformers, name) for name in MODELS[kind])
    model = model_class(config_class(**(SIZES | {"feat_extract_norm": norm} | options)))
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
    return folder


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return save(tmp_path_factory.mktemp("kept") / "wav2vec2")


@pytest.fixture
def folder(kept, tmp_path):
    return Path(shutil.copytree(kept, tmp_path / "model"))


def test_it_does_not_matter_who_imported_transformers_first() -> None:
    code = (
        "import sys, transformers; transformers.utils.is_torchaudio_available()\n"
        "from apps.speech.models.huggingface import import_transformers\n"
        "import_transformers().Wav2Vec2ForCTC; assert sys.modules.get('torchaudio', 'none') is not None"
    )
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def samples(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.02, 0.1, count).astype(np.float32)


def write(folder: Path, name: str, **changes: object) -> None:
    file = folder / name
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(values | changes))


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_a_teacher_of_each_kind_says_what_transformers_says(tmp_path, kind, norm):
    transformers = import_transformers()
    folder = save(tmp_path / "model", kind, norm)
    teacher = HuggingFaceCtc.from_folder(folder, UNITS)
    audio = samples(16_000)
    got = teacher.log_probs(audio, frame_ms=20)
    # transformers' own model, features and padding; the last frame hears silence behind the audio
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    values = extractor(audio, sampling_rate=16_000, return_tensors="pt").input_values
    model = getattr(transformers, MODELS[kind][1]).from_pretrained(folder).eval()
    with torch.no_grad():
        theirs = model(torch.nn.functional.pad(values, (0, 80))).logits[0].softmax(-1)
    assert got.shape == (50, 5) and theirs.shape == (50, 12)
    ours = torch.stack([theirs[:, 4], theirs[:, 6] + theirs[:, 9], theirs[:, 5], theirs[:, 7]], 1)
    expected = torch.cat([ours, 1 - ours.sum(1, keepdim=True)], 1)
    torch.testing.assert_close(got.exp(), expected, atol=1e-5, rtol=0)
    assert teacher.classes == len(UNITS.symbols) + 1
    assert teacher.parameter_count() == sum(each.numel() for each in model.parameters())
    assert not any(each.requires_grad for each in teacher.parameters())


def test_frames_are_as_many_as_an_acoustic_model_gives(kept):
    teacher = HuggingFaceCtc.from_folder(kept, UNITS)
    for count in (0, 1, 79, 80, 399, 640, 719, 720, 721, 5000, 16_000):
        frames = int(output_lengths(torch.tensor(len(fbank(samples(count))))))
        assert teacher.log_probs(samples(count)).shape == (frames, 5)
        assert teacher.log_probs(samples(count), frame_ms=20).shape == (2 * frames, 5)


@pytest.mark.parametrize(
    ("kind", "norm"), [("wav2vec2", "layer"), ("wav2vec2", "group"), ("hubert", "layer"), ("wavlm", "layer")]
)
def test_an_utterance_is_the_same_in_any_batch(tmp_path, kind, norm):
    teacher = HuggingFaceCtc.from_folder(save(tmp_path / "model", kind, norm), UNITS)
    audio = [samples(count, count) for count in (5000, 12_000, 20, 8000, 8000)]
    together = teacher.batch_log_probs(audio)
    for got, each in zip(together, audio, strict=True):
        torch.testing.assert_close(got, teacher.log_probs(torch.from_numpy(each)), atol=1e-5, rtol=0)
    assert teacher.batch_log_probs([]) == []


@given(
    rows=st.lists(st.lists(st.floats(0.001, 1), min_size=4, max_size=4), min_size=2, max_size=8).filter(
        lambda each: len(each) % 2 == 0
    )
)
@settings(max_examples=40, deadline=None)
def test_pairs_are_means_by_what_is_no_blank(rows):
    values = np.array(rows) / np.sum(rows, axis=1, keepdims=True)
    spoken = 1 - values[:, -1:]
    expected = (values[0::2] * spoken[0::2] + values[1::2] * spoken[1::2]) / (spoken[0::2] + spoken[1::2])
    got = paired(torch.tensor(np.log(values), dtype=torch.float32)).exp().numpy()
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_spike_beside_a_blank_keeps_its_height_and_blanks_stay_blanks():
    rows = torch.tensor([[0.98, 0.0, 0.02], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]).log()
    got = paired(rows).exp()
    torch.testing.assert_close(got, torch.tensor([[0.98, 0.0, 0.02], [0.0, 0.0, 1.0]]), atol=1e-5, rtol=0)
    assert paired(torch.empty(0, 3)).shape == (0, 3)


def test_normalisation_is_what_the_folder_says(folder):
    audio = samples(4000)
    default = HuggingFaceCtc.from_folder(folder, UNITS).log_probs(audio)
    # normalised samples do not know how loud they were
    torch.testing.assert_close(
        HuggingFaceCtc.from_folder(folder, UNITS).log_probs(audio * 3), default, atol=1e-3, rtol=0
    )
    write(folder, "preprocessor_config.json", do_normalize=False, sampling_rate=16_000)
    raw = HuggingFaceCtc.from_folder(folder, UNITS).log_probs(audio)
    assert (raw - default).abs().max() > 1e-3


def test_case_is_kept_where_the_units_have_both(folder):
    teacher = HuggingFaceCtc.from_folder(folder, Units(("a", "A", "▁")))
    assert [[each for each in row if each >= 0] for row in teacher.groups.tolist()] == [
        [9],
        [6],
        [4],
        [0, 1, 2, 3, 5, 7, 8, 10, 11],
    ]


def test_another_delimiter_and_blank_are_read(folder):
    (folder / "vocab.json").write_text(json.dumps({"_": 4, "a": 1, "b": 2, "c": 3, "|": 5, "[PAD]": 11}))
    write(folder, "tokenizer_config.json", word_delimiter_token="_")
    write(folder, "config.json", pad_token_id=11)
    groups = HuggingFaceCtc.from_folder(folder, UNITS).groups.tolist()
    assert [row[0] for row in groups[:4]] == [4, 1, 2, 3]
    assert groups[4] == [0, 5, 6, 7, 8, 9, 10, 11]


def test_symbols_the_vocabulary_misses_are_named(kept):
    with pytest.raises(UserError, match=r"vocab.json: has no token for 2 of the 5 symbols: é '$"):
        HuggingFaceCtc.from_folder(kept, Units(("▁", "a", "é", "b", "'")))


def test_silence_and_long_audio(kept):
    teacher = HuggingFaceCtc.from_folder(kept, UNITS)
    assert teacher.log_probs(np.zeros(3200, np.float32)).isfinite().all()
    with pytest.raises(UserError, match=r"audio of 36000 s: .* at most 120 s"):
        teacher.log_probs(np.broadcast_to(np.float32(0), 36_000 * 16_000))


def test_the_longest_utterance_ends_with_its_tail_in_its_slowest_view(kept, monkeypatch):
    assert longest_heard(["clean", "noise:0:10"]) == pytest.approx(119.76)
    assert longest_heard(["clean", "room:0.4+speed:0.5"]) == pytest.approx(119.76 / 2)
    assert longest_heard(["tempo:0.8+speed:0.5", "tempo:1.5"]) == pytest.approx(119.76 * 0.4)
    monkeypatch.setattr("apps.speech.models.huggingface.MOST_SECONDS", 1)
    longest = samples(round(longest_heard(["clean"]) * SAMPLE_RATE))
    teacher = HuggingFaceCtc.from_folder(kept, UNITS)
    assert len(teacher.log_probs(with_tail(longest)))
    with pytest.raises(UserError, match="at most 1 s"):
        teacher.log_probs(with_tail(np.append(longest, longest[:1])))


@pytest.mark.parametrize("bad", [np.zeros((2, 800), np.float32), np.zeros(800), np.full(800, math.nan, np.float32)])
def test_what_is_no_audio_is_refused(kept, bad):
    with pytest.raises(ValueError, match=r"samples: .* float32"):
        HuggingFaceCtc.from_folder(kept, UNITS).log_probs(bad)


def test_another_frame_is_refused(kept):
    with pytest.raises(ValueError, match="frame_ms: got 30, wanted 20 or 40"):
        HuggingFaceCtc.from_folder(kept, UNITS).log_probs(samples(800), frame_ms=30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type: got 'bert', wanted one of wav2vec2, hubert, wavlm"),
        ({"architectures": ["Wav2Vec2Model"]}, r"no CTC head: architectures: got \['Wav2Vec2Model'\]"),
        ({"auto_map": {"AutoModelForCTC": "evil.Model"}}, "auto_map"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
        ({"conv_stride": [5, 2, 2, 2, 2, 2, 1]}, "got a frame each 160 samples"),
        ({"conv_stride": [5, 0]}, "conv_stride: got .* wanted a list"),
        ({"pad_token_id": 40}, "the blank: got 40 of vocab_size 12"),
        ({"vocab_size": 10**9}, "vocab_size 1000000000"),
        ({"hidden_size": 24}, "the model cannot be read"),
        ({"num_hidden_layers": 2}, "weights are missing, wav2vec2.encoder.layers.1"),
    ],
)
def test_what_is_no_such_model_is_refused(folder, changes, message):
    write(folder, "config.json", **changes)
    with pytest.raises(UserError, match=message):
        HuggingFaceCtc.from_folder(folder, UNITS)


def test_a_folder_without_its_files_is_refused(folder, tmp_path):
    def read(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            HuggingFaceCtc.from_folder(path, UNITS)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "nowhere: not a folder" in read(tmp_path / "nowhere")
    assert "config.json: No such file" in read(tmp_path)
    write(folder, "adapter_config.json", base_model_name_or_path="x/y")
    assert "holds an adapter" in read(folder)
    (folder / "adapter_config.json").unlink()
    write(folder, "preprocessor_config.json", sampling_rate=8000)
    assert "sampling_rate: got 8000, wanted 16000" in read(folder)
    (folder / "preprocessor_config.json").unlink()
    (folder / "vocab.json").write_text(json.dumps({"eng": {"a": 1}}))
    assert "wanted ids by token" in read(folder)
    (folder / "vocab.json").write_text("[1")
    assert "vocab.json: not JSON" in read(folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
    assert "the model cannot be read" in read(folder)


def test_pickled_weights_are_refused_and_not_opened(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weights, wanted model.safetensors"):
        HuggingFaceCtc.from_folder(folder, UNITS)
    (folder / "pytorch_model.bin").write_bytes(b"no pickle at all")
    with pytest.raises(UserError, match=r"only pickled weights \(pytorch_model.bin\), which can run code"):
        HuggingFaceCtc.from_folder(folder, UNITS)


def test_weights_in_parts_are_read_and_none_from_elsewhere(folder, tmp_path):
    transformers = import_transformers()
    expected = HuggingFaceCtc.from_folder(folder, UNITS).log_probs(samples(4000))
    parts = tmp_path / "parts"
    transformers.Wav2Vec2ForCTC.from_pretrained(folder).save_pretrained(parts, max_shard_size="10KB")
    shutil.copy(folder / "vocab.json", parts)
    assert not (parts / "model.safetensors").exists()
    torch.testing.assert_close(HuggingFaceCtc.from_folder(parts, UNITS).log_probs(samples(4000)), expected)
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.bias"] = "../model/model.safetensors"
    (parts / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"weight_map: got '../model/model.safetensors'"):
        HuggingFaceCtc.from_folder(parts, UNITS)
