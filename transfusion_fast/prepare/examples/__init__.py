"""Example data sets, from digits to stories."""
