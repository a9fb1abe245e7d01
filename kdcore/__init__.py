"""Distillation: losses, teaching, one training loop, runs and reports."""

__version__ = "0.1.0"
