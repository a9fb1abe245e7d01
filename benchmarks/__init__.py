"""Slow studies: each is a command, writes JSON to results/, and feeds the README."""
