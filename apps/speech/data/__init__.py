"""Speech corpora: utterances from the formats they come in, and from shards too large for one folder."""
