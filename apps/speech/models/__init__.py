"""Acoustic models by kind, and their sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from apps.speech.models.attention import AttentionCtc, AttentionOptions
from apps.speech.models.base import AcousticModel, StreamingModel
from apps.speech.models.conformer import ChunkedConformer, ChunkedConformerOptions, Conformer, ConformerOptions
from apps.speech.models.recurrent import BiLstm, BiLstmOptions, ConvRnn, ConvRnnOptions
from kdcore.config import UserError, build, nearest

# kind -> (class, its options)
KINDS: dict[str, tuple[type[AcousticModel], type[Any]]] = {
    "bilstm": (BiLstm, BiLstmOptions),
    "attention": (AttentionCtc, AttentionOptions),
    "conv_rnn": (ConvRnn, ConvRnnOptions),
    "conformer": (Conformer, ConformerOptions),
    "chunked_conformer": (ChunkedConformer, ChunkedConformerOptions),
}
# kind -> size -> options: about 0.3, 0.85 and 3 million weights with 28 symbols
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "conv_rnn": {
        "tiny": {"channels": (8, 16), "width": 112, "hidden": 112, "kernel": 7},
        "small": {},
        "base": {"channels": (16, 32), "width": 320, "hidden": 384, "convolutions": 3},
        # no recurrence: ten convolutions over 20 frames each, about 0.55 million
        "convolutional": {"width": 200, "convolutions": 10, "kernel": 20, "layers": 0},
    },
    "conformer": {
        "tiny": {"channels": (8, 16), "width": 64, "blocks": 4, "feed_forward": 160},
        "small": {"width": 96, "blocks": 5, "feed_forward": 224},
        "base": {},
    },
    "chunked_conformer": {
        "tiny": {"channels": (8, 16), "width": 64, "blocks": 4, "feed_forward": 160},
        "small": {},
        "base": {"width": 176, "blocks": 6, "feed_forward": 352},
    },
}
# what has as many weights with GRUs, which have three gates where LSTMs have four
_GRU_HIDDEN = {"tiny": 136, "small": 248, "base": 464}


def model_options(kind: str, options: Mapping[str, Any]) -> Any:
    """Return the checked options of a kind; ``size`` names a set of them that the others change.

    Raises:
        UserError: an unknown kind, size or option, named with the nearest.
    """
    if kind not in KINDS:
        raise UserError(f"kind: unknown model {kind!r}, {nearest(kind, KINDS)}")
    given = dict(options)
    size = given.pop("size", None)
    sizes = SIZES.get(kind, {})
    if size is not None and not sizes:
        known = ", ".join(each.name for each in fields(KINDS[kind][1]))
        raise UserError(f"options.size: got {size!r}, but {kind} has no sizes; wanted any of its options: {known}")
    if size is not None and size not in list(sizes):  # which may be of any type, a list too
        raise UserError(f"options.size: {kind} has no size {size!r}, {nearest(str(size), sizes)}")
    of_size = {} if size is None else dict(sizes[size])
    if kind == ConvRnn.kind and given.get("cell") == "gru" and size in _GRU_HIDDEN:
        of_size["hidden"] = _GRU_HIDDEN[size]
    names = [each.name for each in fields(KINDS[kind][1])]
    if sizes and (unknown := next((name for name in given if name not in names), None)) is not None:
        raise UserError(f"options: unknown setting {str(unknown)!r}, {nearest(str(unknown), ['size', *names])}")
    return build(KINDS[kind][1], {**of_size, **given}, "options")


def new_model(kind: str, classes: int, options: Mapping[str, Any]) -> AcousticModel:
    """Return a model with random weights; ``classes`` counts the blank."""
    return KINDS[kind][0](classes, model_options(kind, options))


__all__ = ["KINDS", "SIZES", "AcousticModel", "StreamingModel", "model_options", "new_model"]
