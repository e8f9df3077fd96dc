"""The model: sequences of text and patches, layers, losses."""
