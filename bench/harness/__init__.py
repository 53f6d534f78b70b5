"""Parts of the benchmarks that the commands share."""
