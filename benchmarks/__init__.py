"""Benchmarks: one room per subject; each writes a page and its numbers to docs/."""
