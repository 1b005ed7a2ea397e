"""What all benchmarks share: tables, goals and writing of results."""
