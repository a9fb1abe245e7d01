"""Which part of a run a split is, by its name. No torch."""

from __future__ import annotations

import re

# what the parts are called by those who publish corpora
PARTS = {
    "train": ("train", "training", "tr"),
    "valid": ("valid", "dev", "val", "validation", "devel", "development"),
    "test": ("test", "eval", "testing", "evaluation", "tst", "devtest"),
}


def part_of(split: str) -> str | None:
    """Return the part that a split is by its name, as ``train-clean-100`` or ``eval2000``; None for another.

    The last word that names one counts: ``train_dev`` validates, and of Kaldi's names ``test_dev93`` does too. What
    follows a ``no`` does not: ``train_no_dev`` trains.
    """
    words = re.sub(r"(?<![a-z])no[-_. ]?(dev|test|eval)(?![a-z])", "", split.lower())
    of_word = {name: part for part, names in PARTS.items() for name in names}
    found = [of_word[word] for word in re.findall(r"[a-z]+", words) if word in of_word]
    return found[-1] if found else None
