"""Kernel: a small C++ library that searches inverted lists. Without it faiss gives the same answers, more slowly."""
