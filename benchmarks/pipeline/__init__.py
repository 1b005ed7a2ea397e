"""Benchmarks of the data stages, the download and near-copy removal."""
