"""The library's own stages, one file each. Their order is one list in app.py."""
