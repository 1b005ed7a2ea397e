"""optout: hides or erases the images of a blocklist in all finished stages, without running the stages again."""
