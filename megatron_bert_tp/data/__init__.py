"""From text files to microbatches: tokenizer, corpus, samples, sentence pairs, masks and batches."""
