"""The console command, recipes, arguments and errors. Imports nothing: `laion-rdm --help` must answer at once."""
