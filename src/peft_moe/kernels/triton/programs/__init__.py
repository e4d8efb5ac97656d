"""The programs that run on the GPU, each for one tile of work."""
