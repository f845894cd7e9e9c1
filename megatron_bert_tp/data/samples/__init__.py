"""From sample numbers to masked sentence pairs: spans, order, index, blends, pairs, masks."""
