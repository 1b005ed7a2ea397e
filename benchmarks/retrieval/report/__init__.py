"""Tables, goals, plot and projection of the retrieval benchmark."""
