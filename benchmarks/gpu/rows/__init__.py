"""The rows of `make gpu-day`. A row's `cases` names its measurements in order; `day.py` has what they share."""
