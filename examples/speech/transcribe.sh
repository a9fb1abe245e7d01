#!/bin/sh
# Transcribes a file with a running `kd speech serve`, as JSON and as SubRip subtitles: transcribe.sh FILE [URL]
set -eu
file=${1:?usage: transcribe.sh FILE [URL]}
url=${2:-http://127.0.0.1:8000}/v1/audio/transcriptions

# words with times and confidences; --fail-with-body shows the reason of a refusal and exits with 22
curl -sS --fail-with-body "$url" -F "file=@\"$file\"" -F response_format=verbose_json -F "timestamp_granularities[]=word"
echo
curl -sS --fail-with-body "$url" -F "file=@\"$file\"" -F response_format=srt
