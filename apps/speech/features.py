"""The features of every model, in training and on the device: 80 log-mel bins each 10 ms, by kaldi-native-fbank.

They are those that sherpa-onnx gives a deployed student (``OnlineRecognizer.from_nemo_ctc``; a test asks it): 25 ms
frames each 10 ms (the first one centred, so that n samples have n / 160 frames, rounded), Hann window, pre-emphasis
0.97, no dither, an offset of the samples left in, the mel bins of librosa (Slaney's scale, each of area 1) up to 8000
Hz. No torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import kaldi_native_fbank

SAMPLE_RATE = 16_000
FEATURES = 80
FEATURE_SHIFT_MS = 10
# what digital silence has: the log of the smallest energy that is told from 0, float32's epsilon
SILENCE = float(np.log(np.finfo(np.float32).eps))
# silence behind every utterance, in training and on the device: a streaming model speaks a little after it has heard
TAIL_MS = 240
# of what ``fbank`` gives: kept features of another version are computed anew
VERSION = 2


def _options() -> kaldi_native_fbank.FbankOptions:
    from kaldi_native_fbank import FbankOptions

    options = FbankOptions()
    frame, mel = options.frame_opts, options.mel_opts
    frame.samp_freq, frame.frame_length_ms, frame.frame_shift_ms = SAMPLE_RATE, 25.0, float(FEATURE_SHIFT_MS)
    frame.dither, frame.preemph_coeff, frame.remove_dc_offset = 0.0, 0.97, False
    frame.window_type, frame.snip_edges = "hann", False
    mel.num_bins, mel.low_freq, mel.high_freq, mel.is_librosa = FEATURES, 0.0, 0.0, True  # 0: to half the rate
    return options


class OnlineFeatures:
    """Features of audio that comes in packets; what they are does not depend on how it is split."""

    def __init__(self) -> None:
        from kaldi_native_fbank import OnlineFbank

        self._fbank = OnlineFbank(_options())
        self._taken = 0

    def accept(self, samples: np.ndarray) -> np.ndarray:
        """Take samples float32 [n] in [-1, 1] and return the frames float32 [T, 80] that are complete now."""
        if len(samples):
            self._fbank.accept_waveform(SAMPLE_RATE, samples)
        return self._ready()

    def finish(self) -> np.ndarray:
        """End the audio and return the last frames."""
        self._fbank.input_finished()
        return self._ready()

    def _ready(self) -> np.ndarray:
        count = self._fbank.num_frames_ready
        frames = np.empty((count - self._taken, FEATURES), np.float32)
        for place, index in enumerate(range(self._taken, count)):
            frames[place] = self._fbank.get_frame(index)  # a view of memory that pop() frees
        self._fbank.pop(count - self._taken)
        self._taken = count
        return frames


def with_tail(samples: np.ndarray) -> np.ndarray:
    """Return samples [n] followed by ``TAIL_MS`` of digital silence."""
    return np.concatenate([samples, np.zeros(TAIL_MS * SAMPLE_RATE // 1000, samples.dtype)])


def fbank(samples: np.ndarray) -> np.ndarray:
    """Return the features float32 [T, 80] of whole audio, float32 [n] in [-1, 1] at 16 kHz.

    Raises:
        ValueError: not one channel of float32.
    """
    if samples.ndim != 1 or samples.dtype != np.float32:
        raise ValueError(f"samples: wanted float32 [n], got {samples.dtype} {samples.shape}")
    features = OnlineFeatures()
    return np.concatenate([features.accept(samples), features.finish()])
