"""`laion-rdm status`: the progress of each stage of a recipe, read from its files."""
