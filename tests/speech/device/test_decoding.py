"""What the device makes of posteriors with a grammar."""

from __future__ import annotations

import numpy as np
import pytest

from apps.speech.device.decoding import Decoder, Decoding
from apps.speech.device.spelling import Symbols
from tests.speech.decode.made import LETTERS, normalise


@pytest.mark.parametrize("beam", [1, 4, 16])
def test_a_grammar_finds_a_word_whose_letters_are_hardly_likely(beam: int) -> None:
    symbols = Symbols(LETTERS)
    logits = np.zeros((7, len(LETTERS) + 1))
    logits[:, -1] = 12.0
    for frame, heard, said in ((1, "j", "y"), (3, "i", "e"), (5, "x", "s")):
        logits[frame, [LETTERS.index(heard), LETTERS.index(said), -1]] = 20.0, 9.0, 0.0
    log_probs = normalise(logits)
    assert np.exp(log_probs[[1, 3, 5], [LETTERS.index(each) for each in "yes"]]).max() < 1e-4
    search = Decoder(symbols, Decoding(beam=beam, grammar=("yes", "no"))).search()
    search.accept(log_probs)
    assert [word["word"] for word in search.words(ended=True)] == ["yes"]
