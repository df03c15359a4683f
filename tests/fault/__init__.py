"""Processes are killed here, and what they leave behind is counted from the outside.

victim.py      one process of a small application: it sends, relays or works, until it ends or is killed
unsafe.py      the same with one protection switched off: what the negative controls run
processes.py   starts, freezes and kills victims
oracle.py      what was committed (ledger, effects) and what arrived (sink), read without the library
invariants.py  what must hold afterwards
world.py       a database, a broker, a sink and the victims of one test
test_*.py      the faults

RUNS=20 SEED=7 pytest tests/fault     # 20 runs of each scenario, seeds 7 to 26
"""
