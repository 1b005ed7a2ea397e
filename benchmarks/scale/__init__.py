"""Benchmark of 231,350 shards in an object store that answers after 30 ms."""
