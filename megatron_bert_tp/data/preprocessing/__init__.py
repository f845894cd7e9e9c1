"""From files of text to a corpus or a vocabulary."""
