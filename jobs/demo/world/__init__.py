"""The demo world, a synthetic data set: pictures with known contents, and metadata in LAION's format."""
