"""Broker and store in memory: the reference implementation of both seams, for tests, tutorials and a first start.

Everything is gone when the process ends; all else is as the contracts in `broker.py`, `store.py`, `outbox.py` and
`inbox.py` say. Two apps of one event loop share a broker or a store by being given the same object.
"""

from cqrs_decor.memory.broker import MemoryBroker as MemoryBroker
from cqrs_decor.memory.broker import MemorySubscription as MemorySubscription
from cqrs_decor.memory.inbox import MemoryInbox as MemoryInbox
from cqrs_decor.memory.outbox import MemoryOutbox as MemoryOutbox
from cqrs_decor.memory.store import MemoryStore as MemoryStore
from cqrs_decor.memory.transaction import MemoryTransaction as MemoryTransaction
