"""One file for each form of raw text: bytes of a span in, documents out."""
