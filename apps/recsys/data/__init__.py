"""Interaction data: formats on disk, the typed data set, histories and splits."""
