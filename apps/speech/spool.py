"""What a model says of many utterances, on disk while it is measured: hours of 1,000 classes do not fit into memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np


class Spool:
    """Arrays float32 [T, C] of ``count`` utterances in a file without a name: it is gone with the last of them."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder = folder
        # beside the run: a folder for temporary files may be in memory
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._places: list[tuple[int, tuple[int, ...]] | None] = [None] * count
        self._end = 0

    def put(self, row: int, values: np.ndarray) -> None:
        """Write the array of an utterance; OSError if there is no room."""
        data = np.ascontiguousarray(values, np.float32)
        self._written(lambda: self._file.write(data.tobytes()))
        self._places[row] = self._end, data.shape
        self._end += data.size

    def _written(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            raise OSError(error.errno, f"no room for what a model says ({error.strerror})", str(self._folder)) from None

    def arrays(self) -> list[np.ndarray]:
        """Return the arrays of all utterances, read from disk when they are looked at; ValueError if one is missing."""
        self._written(self._file.flush)
        whole = np.empty(0, np.float32)
        if self._end:
            # changes stay in memory; torch warns of arrays that allow none
            whole = np.asarray(np.memmap(self._file, np.float32, "c"))
        found = []
        for row, place in enumerate(self._places):
            if place is None:
                raise ValueError(f"row {row}: nothing was put there")
            begin, shape = place
            found.append(whole[begin : begin + int(np.prod(shape))].reshape(shape))
        return found
