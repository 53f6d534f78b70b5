"""What an operator is: its equation, its dispatch, its place in autograd."""
