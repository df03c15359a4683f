"""Processes are killed here, and what they leave behind is counted from the outside.

test_f*.py     the faults, one a file: what is killed, when, and what must hold; setups.py says on what they run
victim.py      one process of a small application (entries.py): it sends, relays or works, until it ends or is killed
parts.py       its store, broker and settings; misfits.py: parts that misbehave as the world does
unsafe.py      the same with one protection switched off: what the negative controls run
witnesses.py   what a victim tells the harness while it lives
nursery.py     forks victims; processes.py freezes, looks at and kills them
proxy.py       connections that are cut, stalled, half open, slow, or lose answers
oracle.py      what was committed (ledger, effects) and what arrived (sink), read without the library
samples.py     what is on the way, four times a second
invariants.py  what must hold afterwards
world.py       a database, a broker, a sink and the victims of one test
report.py      what each run came to, as lines of JSON; page.py draws a page of them

RUNS=20 SEED=7 pytest tests/fault     # 20 runs of each scenario, seeds 7 to 26
FAULT_WIDE=1 pytest tests/fault       # on every setup, and outages last longer
"""
