"""Sources of documents: captioned images, interleaved documents, text."""
