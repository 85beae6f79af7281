"""Searching the fastest tile of a Triton kernel."""
