"""One training step inside a byte budget, with the gradients of the plain step."""
