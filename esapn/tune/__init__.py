"""Settings of every method, found the same way, on the part to train on alone."""
