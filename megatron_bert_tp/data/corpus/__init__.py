"""Tokenised corpora on disk: layout, reading, writing, checking."""
