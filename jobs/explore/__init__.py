"""`laion-rdm explore`: a page and an HTTP API to search databases, make pictures and compare styles."""
