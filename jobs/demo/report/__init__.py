"""The demo's report: numbers that are measured again from the files, goals, and an HTML page."""
