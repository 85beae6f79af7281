"""Stored results: read, compared, drawn, and laid out as one page."""
