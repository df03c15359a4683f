"""Takes orders over HTTP, and learns from billing which of them have been invoiced."""
