"""Three implementations of the one operation; dispatch.py chooses."""
