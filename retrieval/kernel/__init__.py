"""Kernel: a small C++ library that searches inverted lists, helps to build them, and hashes texts.

Without it faiss and `hashlib` do the same: the digests are equal, the results of searches nearly.
"""
