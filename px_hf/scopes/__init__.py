"""What competes with what when weights are chosen, one scope a file."""
