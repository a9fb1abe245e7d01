"""Print the catalogue of losses: python -m kdcore.losses > docs/losses.md."""

from __future__ import annotations

from kdcore.losses import catalogue

if __name__ == "__main__":
    print(catalogue(), end="")
