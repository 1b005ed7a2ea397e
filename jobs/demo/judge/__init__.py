"""The judge of contents: measures which step of the demo loses shape, count, color, background, layout or style."""
