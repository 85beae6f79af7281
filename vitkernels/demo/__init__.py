"""`vitkernels demo`."""
