"""The preparation of data folders, which is run once."""
