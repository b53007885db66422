"""What several machines do together, measured on a local Ray cluster."""
