"""Callbacks and a subclass of transformers' Trainer: sparse training with its checkpoints, resuming and pushes."""
