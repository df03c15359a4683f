"""python load.py --orders 20000 --clients 8: places orders over HTTP, cancels every tenth, and never gives up on one.

An order number is the client's own: when a reply is lost, the client asks again with the same number.
"""

import argparse
import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httpx

CANCEL_EVERY = 10
WAIT_BEFORE_RETRY_S = 0.1
GIVE_UP_AFTER_S = 60.0


@dataclass(slots=True)
class Load:
    """So many orders, from so many clients at a time.

    Attributes:
        placed: Numbers of orders that the shop has confirmed.
        cancelled: Numbers of those whose end it has confirmed.
        retries: Requests that were made again.
        open_requests: Requests that wait for their reply now.
        enough: Once the orders are placed, whether that will do; more are placed until it does.
    """

    url: str
    orders: int
    clients: int = 8
    skus: int = 40
    prefix: str = "order"
    placed: set[str] = field(default_factory=set[str])
    cancelled: set[str] = field(default_factory=set[str])
    retries: int = 0
    open_requests: int = 0
    seconds: float = 0.0
    enough: Callable[[], bool] = lambda: True

    async def run(self) -> None:
        began = time.monotonic()
        numbers = self._numbers()
        async with httpx.AsyncClient(base_url=self.url, timeout=10) as http, asyncio.TaskGroup() as tasks:
            for _ in range(self.clients):
                tasks.create_task(self._order_all(http, numbers))
        self.seconds = time.monotonic() - began

    def _numbers(self) -> Iterator[int]:
        """As many as were asked for, and more for as long as that is not enough."""
        for count in itertools.count():
            if count >= self.orders and self.enough():
                return
            yield count

    async def _order_all(self, http: httpx.AsyncClient, numbers: Iterator[int]) -> None:
        for count in numbers:
            number = f"{self.prefix}-{count:06}"
            body = {"number": number, "sku": f"tea-{count % self.skus:02}", "quantity": 1 + count % 3}
            await self._request(http, "POST", "/orders", body)
            self.placed.add(number)
            if count % CANCEL_EVERY == 0:
                await self._request(http, "DELETE", f"/orders/{number}")
                self.cancelled.add(number)

    async def _request(self, http: httpx.AsyncClient, method: str, path: str, body: object = None) -> None:
        """Ask until there is a reply. A connection that breaks says nothing about what the shop has done."""
        async with asyncio.timeout(GIVE_UP_AFTER_S):
            while True:
                self.open_requests += 1
                try:
                    reply = await http.request(method, path, json=body)
                    reply.raise_for_status()
                    return
                except httpx.TransportError:
                    self.retries += 1
                finally:
                    self.open_requests -= 1
                await asyncio.sleep(WAIT_BEFORE_RETRY_S)

    def __str__(self) -> str:
        rate = len(self.placed) / self.seconds if self.seconds else 0.0
        return (
            f"{len(self.placed)} orders placed, {len(self.cancelled)} of them cancelled, {self.retries} requests "
            f"repeated, {self.seconds:.1f} s, {rate:.0f} orders/s from {self.clients} clients"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--orders", type=int, default=1_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--prefix", default=f"order-{int(time.time())}", help="what the order numbers begin with")
    load = Load(**vars(parser.parse_args()))
    asyncio.run(load.run())
    print(load)


if __name__ == "__main__":
    main()
