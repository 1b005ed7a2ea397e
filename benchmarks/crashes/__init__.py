"""Crash tests: every data stage is struck by every kind of fault, then run again."""
