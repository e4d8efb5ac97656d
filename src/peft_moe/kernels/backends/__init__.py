"""One file per backend; each defines `BACKEND`. A file placed here is found, tested and benchmarked by itself."""
