"""The library's own stages, one file each. Their order is one list in running.py."""
