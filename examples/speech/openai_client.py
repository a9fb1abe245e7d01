"""Transcribes a file with the openai package and a running `kd speech serve`: openai_client.py FILE [URL]"""

import sys
from pathlib import Path

import openai

file, url, *_ = [*(sys.argv[1:] or sys.exit(__doc__)), "http://127.0.0.1:8000/v1"]
# the package wants a key; the service has none and looks at none
client = openai.OpenAI(base_url=url, api_key="none")
(model,) = client.models.list().data
try:
    heard = client.audio.transcriptions.create(
        model=model.id, file=Path(file), response_format="verbose_json", timestamp_granularities=["word"]
    )
except openai.APIStatusError as error:
    sys.exit(str(error))
print(f"{model.id}: {heard.text}")
for word in heard.words or []:
    print(f"{word.start:7.2f} {word.end:7.2f}  {word.word}")
