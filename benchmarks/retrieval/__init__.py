"""Benchmark of our search and join against other libraries."""
