"""The demo: a corpus that every machine has, and the run from raw text to exported weights."""
