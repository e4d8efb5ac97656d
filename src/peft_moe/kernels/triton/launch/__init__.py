"""Starts the programs on tensors: buffers, grids and settings; one module for each path, and one for the sort."""
