"""Benchmarks of the core: losses and the teacher cache, beside the libraries people use now."""
