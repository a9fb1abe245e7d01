"""What to say when a name is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of an error message: the names that come near, else all of them."""
    known = list(known)
    plain = {each.lower(): each for each in known}
    near = [plain[each] for each in difflib.get_close_matches(str(name).lower(), plain, n=3, cutoff=0.5)]
    return f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(known)}"
