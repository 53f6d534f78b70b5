"""Ratings: reading, downloading, drawing, and their order as a stream."""
