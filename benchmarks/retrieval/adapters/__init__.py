"""One adapter for each library, all with the same interface, run in worker processes."""
