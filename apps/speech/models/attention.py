"""A teacher with two heads on one encoder: CTC, and an attention decoder that says when each symbol occurs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apps.speech.models.base import check_sizes
from apps.speech.models.recurrent import BiLstm, BiLstmOptions
from kdcore.losses.contract import Reduction
from kdcore.teaching import Term


@dataclass(frozen=True)
class AttentionOptions(BiLstmOptions):
    """The size of the encoder, and of the decoder."""

    # of symbols, and of the decoder's state
    embedding: int = 64
    decoder: int = 128
    # filters of the convolution over the attention of the symbol before, and the frames each sees
    filters: int = 8
    kernel: int = 15
    # how much the decoder counts beside CTC, in training
    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, "embedding", "decoder", "filters", "kernel")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel: got {self.kernel}, wanted an odd number")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"weight: got {self.weight}, wanted a finite weight >= 0")


class AttentionCtc(BiLstm):
    """Bidirectional LSTMs under a CTC head and a location-aware attention decoder (Watanabe et al., 2017).

    Transcripts are CTC's. The decoder is read for its attention: which frames it looks at for a symbol of a text.
    """

    kind: ClassVar[str] = "attention"

    def __init__(self, classes: int, options: AttentionOptions) -> None:
        super().__init__(classes, options)
        width, state = 2 * options.hidden, options.decoder
        # the blank, which no text holds, is the start
        self.embedding = nn.Embedding(classes, options.embedding)
        self.cell = nn.LSTMCell(options.embedding + width, state)
        self.keys = nn.Linear(width, state)
        self.query = nn.Linear(state, state, bias=False)
        self.location = nn.Conv1d(1, options.filters, options.kernel, padding=options.kernel // 2)
        self.place = nn.Linear(options.filters, state, bias=False)
        self.score = nn.Linear(state, 1, bias=False)
        self.symbol = nn.Linear(state + width, classes)

    def own_terms(self) -> Sequence[Term]:
        """Return the decoder's cross-entropy, which is learned beside CTC."""
        inputs = {"encoded": "student.encoder", "mask": "mask"}
        return [Term("decoder", self.decoder_loss, inputs, weight=self.options.weight)]

    def own_layers(self) -> tuple[str, ...]:
        """Return the layers that ``own_terms`` read."""
        return ("encoder",)

    def attend(self, encoded: Tensor, lengths: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the decoder's logits [B, U, C] and attention [B, U, T] along a text.

        Shapes: encoded [B, T, D]; lengths int64 [B] in frames; labels int64 [B, U].
        """
        keys = self.keys(encoded)
        behind = torch.arange(encoded.shape[1], device=encoded.device) >= lengths[:, None]
        start = labels.new_full((len(labels), 1), self.classes - 1)
        given = self.embedding(torch.cat([start, labels[:, :-1]], 1))
        state = tuple(encoded.new_zeros(len(encoded), self.options.decoder) for _ in range(2))
        context, weights = encoded.new_zeros(len(encoded), encoded.shape[2]), torch.zeros_like(behind, dtype=keys.dtype)
        logits, attention = [], []
        for step in range(labels.shape[1]):
            state = self.cell(torch.cat([given[:, step], context], 1), state)
            where = self.place(self.location(weights[:, None]).transpose(1, 2))
            energy = self.score(torch.tanh(keys + self.query(state[0])[:, None] + where))[..., 0]
            weights = torch.softmax(energy.masked_fill(behind, -torch.inf), 1)
            context = (weights[..., None] * encoded).sum(1)
            logits.append(self.symbol(torch.cat([state[0], context], 1)))
            attention.append(weights)
        return torch.stack(logits, 1), torch.stack(attention, 1)

    def decoder_loss(
        self,
        encoded: Tensor,
        lengths: Tensor,
        labels: Tensor,
        label_lengths: Tensor,
        *,
        mask: Tensor,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """Return the sum over symbols of the decoder's cross-entropy, for the rows of ``mask`` bool [B]."""
        if not bool(mask.any()) or not labels.shape[1]:
            return encoded.sum() * 0.0
        logits, _ = self.attend(encoded[mask], lengths[mask], labels[mask])
        counted = torch.arange(labels.shape[1], device=labels.device) < label_lengths[mask][:, None]
        value = F.cross_entropy(logits[counted], labels[mask][counted], reduction="sum")
        return value / int(mask.sum()) if reduction == "mean" else value

    @torch.no_grad()
    def frame_targets(self, encoded: Tensor, lengths: Tensor, labels: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return log q float32 [T', C] of each text: q(t, k) is the attention on frame t of all its symbols k.

        What a frame has of symbols is brought to at most 1 in all, and the blank has the rest.

        Reference: after Moriya et al., Distilling Attention Weights for CTC-Based ASR Systems, ICASSP 2020.
        """
        longest = max((len(each) for each in labels), default=0)
        padded = torch.zeros(len(labels), max(longest, 1), dtype=torch.int64)
        for row, each in enumerate(labels):
            padded[row, : len(each)] = torch.tensor(each, dtype=torch.int64)
        _, attention = self.attend(encoded, lengths.to(encoded.device), padded.to(encoded.device))
        attention = attention.cpu()
        found = []
        for row, each in enumerate(labels):
            frames = int(lengths[row])
            shares = torch.zeros(frames, self.classes)
            for place, symbol in enumerate(each):
                shares[:, symbol] += attention[row, place, :frames]
            shares = shares / shares.sum(1, keepdim=True).clamp(min=1.0)
            shares[:, -1] = 1 - shares.sum(1)
            found.append(shares.clamp(min=0).log())
        return found
