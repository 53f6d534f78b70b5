"""ESAPN: embedding sizes searched by reinforcement learning on a stream (SIGIR 2020)."""
