"""Many models in one budget, with deadlines that are kept."""
