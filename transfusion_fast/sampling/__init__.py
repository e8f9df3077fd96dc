"""What a trained model produces, and how good it is."""
