"""Small random Hugging Face models, as folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from apps.speech.models.huggingface import import_transformers


def pretrained(folder: Path, symbols: Sequence[str]) -> Path:
    """Write a small random Hugging Face model that knows some symbols, in several shards."""
    transformers = import_transformers()
    names = ["<pad>", "<s>", "</s>", "<unk>", "|", *(symbol.upper() for symbol in symbols if symbol != "▁")]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.Wav2Vec2Config(
        vocab_size=len(names),
        conv_dim=[8] * 7,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        pad_token_id=0,
        feat_extract_norm="layer",
        **sizes,
    )
    transformers.Wav2Vec2ForCTC(config).save_pretrained(folder, max_shard_size="10KB")
    (folder / "vocab.json").write_text(json.dumps({name: index for index, name in enumerate(names)}))
    return folder
