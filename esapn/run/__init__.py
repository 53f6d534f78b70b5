"""One run: the loop over the stream, its measurements, its files."""
