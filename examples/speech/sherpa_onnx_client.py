"""Transcribes a file with sherpa-onnx and a folder of `kd speech export`: sherpa_onnx_client.py FOLDER FILE

Needs pip install sherpa-onnx soundfile, and nothing of kdsuite.
"""

import json
import sys
from pathlib import Path

import numpy as np
import sherpa_onnx
import soundfile

if len(sys.argv) != 3:
    sys.exit(__doc__)
folder = Path(sys.argv[1])
about = json.loads((folder / "kdsuite.json").read_text(encoding="utf-8"))
# an export may hold one of both alone
model = next(path for name in ("model.int8.onnx", "model.onnx") if (path := folder / name).exists())
recognizer = sherpa_onnx.OnlineRecognizer.from_nemo_ctc(
    tokens=str(folder / "tokens.txt"), model=str(model), num_threads=1
)
samples, rate = soundfile.read(sys.argv[2], dtype="float32", always_2d=True)
# sherpa-onnx decodes a window when it has a little more than that: without silence behind it, the last words are lost
silence = np.zeros(round((0.27 + about["chunk_ms"] / 1000) * rate), np.float32)
stream = recognizer.create_stream()
stream.accept_waveform(rate, np.concatenate([samples.mean(axis=1), silence]))
stream.input_finished()
while recognizer.is_ready(stream):
    recognizer.decode_stream(stream)
print(recognizer.get_result(stream).strip())
