"""The demo's web server: serves the pictures of the demo world and simulates common failures."""
