"""Kernel: a small C++ library that searches inverted lists. Without it faiss searches, with nearly the same results."""
