"""What a run did, measured and drawn: predicted against measured, the same bits, the timeline."""
