"""The tape: the operators of one forward pass, so that what was dropped can be computed again."""
