"""What the user asks for: ``tasks.yaml``, its schema, and RT-Swap's configuration lines."""
