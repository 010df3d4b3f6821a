"""The comparison of criteria: one cell, the data that cells share, and the tables and plots of the results."""
