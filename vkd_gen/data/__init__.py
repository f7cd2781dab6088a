"""Images to train on and to compare with: sources, decoding, streaming, and draws from them."""
