"""Questions: from a source through raw records to checked examples."""
