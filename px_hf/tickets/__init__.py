"""Tickets beyond weights to keep: which weights to tune (`px.select_trainable`), which patches to read."""
