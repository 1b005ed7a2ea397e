"""Benchmarks of the data loader, the training step, the schedule, sampling and the GPU."""
