"""What we ask of a model: its inputs, its prunable weights, its modes, its sizes."""
