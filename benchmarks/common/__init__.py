"""What all benchmarks share: tables, goals, results, ports and environments."""
