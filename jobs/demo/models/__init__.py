"""The demo's models: a small CLIP and a small autoencoder, trained on scenes of the demo world."""
