"""Writes an invoice for each order it hears of. Shares nothing with the shop but topics and wire names."""
