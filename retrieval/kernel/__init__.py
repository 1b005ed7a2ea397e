"""Kernel: a small C++ library that searches inverted lists and helps to build them; without it faiss does both.

The results are nearly the same.
"""
