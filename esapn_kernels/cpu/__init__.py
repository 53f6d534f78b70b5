"""The same operators for CPUs."""
