"""From the text of a document to the ids of its sentences: byte-level BPE, trained and applied; Unigrams, applied."""
