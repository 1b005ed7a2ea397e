"""The command `import`: takes your own pictures."""
