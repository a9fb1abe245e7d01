"""Retrieval by inner product over the item vectors of an exported recommender.

Vectors are a float32 [n, d] array that the caller owns, as a rule a read-only memory map; an item bias, if any, is one
more coordinate, and the query has a 1 there. Norms matter: nothing here is a cosine. Whatever finds the candidates,
scores are exact float32 products with the caller's vectors, the same for a query alone and in a batch.

Rooms: ``searching`` asks an index, ``filters`` leaves items out, ``building`` makes and tunes an index, ``files`` keeps
it, ``opening`` decides. Nothing imports torch.
"""

from apps.recsys.index.filters import Filter, fetch_size, first_filtered, search_filtered
from apps.recsys.index.opening import open_index
from apps.recsys.index.searching import KINDS, Index

__all__ = ["KINDS", "Filter", "Index", "fetch_size", "first_filtered", "open_index", "search_filtered"]
