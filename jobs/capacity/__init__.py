"""`laion-rdm capacity`: storage, bandwidth, hours and cost of each stage of a recipe, calculated."""
