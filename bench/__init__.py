"""Benchmarks and studies: slow, and not part of the test suite."""
