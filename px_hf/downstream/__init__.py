"""The published report of a downstream evaluation: page, figure, and where it is attached to a model."""
