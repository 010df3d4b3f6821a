"""The comparison of criteria: methods, cells, the data that cells share, results as tables and as a figure."""
