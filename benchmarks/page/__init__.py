"""Load test of the explore page."""
