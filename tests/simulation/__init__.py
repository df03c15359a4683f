"""Relays, workers and producers on a virtual clock, with faults by seed: months of bad luck in a minute.

The classes that run are the library's own; only time, scheduling and the way to store and broker are simulated. Run it
with `python -m tests.simulation --messages 100000 --seed 1`.
"""
