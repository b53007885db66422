"""What narrowboat's commands write, read back: found by its content, checked, and as values that can be drawn."""
