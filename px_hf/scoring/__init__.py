"""What criteria score with: the network with masks, the network of path sums, exact sums over processes."""
