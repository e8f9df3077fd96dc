"""Data on disk: documents packed offline into WebDataset shards, and the order in which a run reads them."""
