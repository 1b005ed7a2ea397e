"""Commands: one module per stage and command, recipes, launchers, the demo and the page."""
