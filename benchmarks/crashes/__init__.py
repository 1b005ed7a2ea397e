"""Crash tests: inject every kind of fault into every data stage, then run the stage again."""
