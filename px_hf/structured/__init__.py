"""Structured pruning: whole units chosen by the path flow through them, and taken out physically."""
