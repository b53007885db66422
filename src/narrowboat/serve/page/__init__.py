"""The live page: one document, the events that feed it, and tasks tried by hand."""
