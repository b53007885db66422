"""Ready recipes: what a model can learn (``goal``), from which data, and the loop over it."""
