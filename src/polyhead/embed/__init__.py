"""Texts to vectors: the encoding engine, its backends, and the parts of a text."""
