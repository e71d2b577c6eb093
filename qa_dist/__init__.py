"""qa_dist: multi-GPU training of extractive question answerers.

Importing this package does nothing and pulls in no heavy library: every entry point imports what it needs.
"""

__version__ = "0.1.0"
