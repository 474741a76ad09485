"""What is not in the paper; each part is off by default and readable alone."""
