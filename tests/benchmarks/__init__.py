"""Ratios in one run: ours against doing it by hand, the raw client, a peer. `python -m tests.benchmarks`.

No figure here is asserted anywhere: the machines that run this are too different and too busy. What is compared runs
alternately in the same process or the same minute, and the median of the ratios is what is printed.
"""
