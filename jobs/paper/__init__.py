"""`laion-rdm paper`: the paper's figures and measurements on a finished run, and their page."""
