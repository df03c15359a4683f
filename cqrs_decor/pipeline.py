"""One chain per handler, composed once: stages around the compiled call, the outermost first."""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cqrs_decor.context import MessageContext, Origin
from cqrs_decor.dispatch import Next
from cqrs_decor.handlers import HandlerSpec

CallNext = Callable[[Any], Awaitable[Any]]


class Middleware(Protocol):
    """What users write: runs around every command, query, event and consumed message.

    `return await call_next(message)` goes on; not calling it skips the handler; calling it twice runs it twice. The
    context of the message is `MessageContext.current()`. Called concurrently.
    """

    async def __call__(self, message: Any, call_next: CallNext) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Handling:
    """What stages know of a handler when the chain is composed.

    Attributes:
        spec: The handler.
        joined: The chain runs inside another dispatch: its transaction is there already.
        consumed: The messages come from a broker.
        batched: The chain is one of many in a transaction that somebody else begins and ends; joined as well.
        keyed: The commands come with an idempotency key.
        uses_resources: The handler, or something it depends on, asks for a session or the like.
        cleans_up: Something is made for each message and must be closed after it.
    """

    spec: HandlerSpec
    joined: bool = False
    consumed: bool = False
    batched: bool = False
    keyed: bool = False
    uses_resources: bool = False
    cleans_up: bool = False


class Stage(Protocol):
    """One of the library's own steps around a handler."""

    name: str

    def wrap(self, handling: Handling, call_next: Next) -> Next:
        """The chain with this step in front; `call_next` itself where the step has nothing to do for this handler."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A handler, ready to run.

    Attributes:
        own: The chain that begins and ends a transaction.
        joined: The chain that takes part in another dispatch's.
        batched: The chain of an optimistic consumer for one of many messages in a transaction: noting them in the
            inbox, and the end of the transaction, belong to whoever calls it. None for all others.
        keyed: As `own`, for commands with an idempotency key.
        keyed_joined: As `joined`, for those.
        bare: The call without its chain, where the chain would only conclude what the handler emits: whoever calls this
            must, if the context was used, `conclude` or `abandon` it, as the chain would.
        order: The stages of `own`, outermost first.
        source: The compiled call.
    """

    spec: HandlerSpec
    origin: Origin
    own: Next
    joined: Next
    batched: Next | None
    keyed: Next
    keyed_joined: Next
    order: tuple[str, ...]
    source: str
    bare: Callable[[Any], Awaitable[Any]] | None
    conclude: Callable[[MessageContext], Awaitable[None]]
    abandon: Callable[[MessageContext], Awaitable[None]]


def compose(stages: Sequence[Stage], handling: Handling, innermost: Next) -> tuple[Next, tuple[str, ...]]:
    """Wrap `innermost` in the stages that concern this handler; returns the chain and their names, outermost first."""
    chain = innermost
    taken: list[str] = []
    for stage in reversed(stages):
        wrapped = stage.wrap(handling, chain)
        if wrapped is not chain:
            taken.append(stage.name)
        chain = wrapped
    return chain, tuple(reversed(taken))


class UserMiddlewares:
    """The user's middlewares, the first outermost."""

    name = "middlewares"

    def __init__(self, middlewares: Iterable[Middleware]) -> None:
        self._middlewares = tuple(middlewares)

    def wrap(self, handling: Handling, call_next: Next) -> Next:
        for middleware in reversed(self._middlewares):
            call_next = _around(middleware, call_next)
        return call_next


def _around(middleware: Middleware, call_next: Next) -> Next:
    async def run(message: Any, context: MessageContext) -> Any:
        return await middleware(message, lambda passed_on: call_next(passed_on, context))

    return run
