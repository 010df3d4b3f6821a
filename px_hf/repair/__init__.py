"""Repairing what pruning broke, without training."""
