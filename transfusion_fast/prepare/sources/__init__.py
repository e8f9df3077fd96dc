"""Where documents come from: each source cuts its files into units that several processes can read."""
