"""Models that the methods train."""
