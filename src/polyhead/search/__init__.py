"""Search: documents in, ranked answers with reasons out."""
