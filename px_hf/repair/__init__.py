"""Repair without training: what pruning broke is made good on the weights that stay, with unlabelled images."""
