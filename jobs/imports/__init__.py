"""The command `import`: takes pictures that are there already."""
