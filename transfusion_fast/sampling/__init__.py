"""Samples of a trained model, and their quality."""
