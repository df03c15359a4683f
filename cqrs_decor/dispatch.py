"""From (handler, message, context) to one awaited call.

The call of each handler is written out as Python source and compiled once, as one would write it by hand: dependencies
in order, then the handler. Nothing is looked up per message.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import anyio.to_thread

from cqrs_decor.context import MessageContext
from cqrs_decor.dependencies import AppValues, FromContext, FromProvider, FromTransaction, Graph, Node, call_factory
from cqrs_decor.handlers import HandlerSpec, Parameter

Next = Callable[[Any, MessageContext], Awaitable[Any]]
TakeEvents = Callable[[MessageContext, Any], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerGraphs:
    """What a handler needs: to be made (a class), and to be called."""

    constructor: Graph
    call: Graph

    @property
    def resources(self) -> set[type[Any]]:
        return self.constructor.resources | self.call.resources

    @property
    def cleans_up(self) -> bool:
        """Whether anything that is made for one message must be closed after it."""
        return any(
            isinstance(node, FromProvider) and node.provider.lifetime != "app" and "generator" in node.provider.style
            for graph in (self.constructor, self.call)
            for node in graph.nodes()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A call, ready to run.

    Attributes:
        call: With message and context.
        bare: With the message alone, where it does not use the context; the handler itself if it asks for nothing.
        source: For the curious (`cqrs-decor handlers --source`).
    """

    call: Next
    bare: Callable[[Any], Awaitable[Any]] | None
    source: str


def compile_call(
    spec: HandlerSpec,
    graphs: HandlerGraphs,
    values: AppValues,
    *,
    sync_on_transaction: bool,
    limiter: anyio.CapacityLimiter | None,
) -> Compiled:
    """Compile the call of one handler.

    Args:
        spec: The handler.
        graphs: What it needs; app-scoped objects must be prepared.
        values: The app-scoped objects.
        sync_on_transaction: A `def` handler that uses a synchronous session: run where that session can be used.
        limiter: Bounds the threads of other `def` handlers.
    """
    writer = _SourceWriter(values)
    target = writer.name(spec.target)
    if spec.constructor is not None:
        writer.line(f"handler = {target}({writer.arguments(graphs.constructor.arguments)})")
        target = "handler.handle"
    arguments = ", ".join(filter(None, ("message", writer.arguments(graphs.call.arguments))))
    writer.call(spec, target, arguments, sync_on_transaction=sync_on_transaction, limiter=limiter)
    if spec.offers_events:
        writer.line("for event in handler.events:")
        writer.line("    context.origin.take_event(context, event)")
    return writer.compiled()


class _SourceWriter:
    """Collects the lines of one call and the names that they use."""

    def __init__(self, values: AppValues) -> None:
        self._values = values
        self._lines: list[str] = []
        self._names: dict[str, Any] = {}
        self._made: dict[Any, str] = {}

    def line(self, text: str) -> None:
        self._lines.append(text)

    def name(self, thing: Any) -> str:
        """A name in the compiled source that stands for a ready-made object."""
        name = f"_{len(self._names)}"
        self._names[name] = thing
        return name

    def arguments(self, arguments: Sequence[tuple[Parameter, Node]]) -> str:
        """The argument list of a call: by position, which is the faster call, until a default leaves a gap."""
        texts: list[str] = []
        for place, (parameter, node) in enumerate(arguments):
            by_name = parameter.keyword_only or parameter.place != place
            texts.append(f"{parameter.name}={self._expression(node)}" if by_name else self._expression(node))
        return ", ".join(texts)

    def call(
        self,
        spec: HandlerSpec,
        target: str,
        arguments: str,
        *,
        sync_on_transaction: bool,
        limiter: anyio.CapacityLimiter | None,
    ) -> None:
        if spec.style == "async":
            self.line(f"result = await {target}({arguments})")
            return
        bound = f"{self.name(partial)}({target}, {arguments})"
        if sync_on_transaction:
            self.line(f"result = await context.unit_of_work.transaction.run_sync({bound})")
        else:
            run = self.name(anyio.to_thread.run_sync)
            self.line(f"result = await {run}({bound}, limiter={self.name(limiter)})")

    def compiled(self) -> Compiled:
        body = self._lines
        if body[-1].startswith("result = "):
            body = [*body[:-1], body[-1].replace("result = ", "return ", 1)]
        else:
            body = [*body, "return result"]
        source = "\n    ".join(["async def call(message, context):", *body])
        uses_context = any("context" in line for line in body)
        return Compiled(
            call=self._run(source),
            bare=None if uses_context else self._bare(body),
            source=source,
        )

    def _bare(self, body: Sequence[str]) -> Callable[[Any], Awaitable[Any]]:
        if body == ["return await _0(message)"]:
            return self._names["_0"]  # type: ignore[no-any-return]  # the handler itself
        return self._run("\n    ".join(["async def call(message):", *body]))

    def _run(self, source: str) -> Callable[..., Awaitable[Any]]:
        scope: dict[str, Any] = dict(self._names)
        exec(compile(source, "<compiled handler call>", "exec"), scope)  # noqa: S102 - our own lines, no user text but names
        call: Callable[..., Awaitable[Any]] = scope["call"]
        return call

    def _expression(self, node: Node) -> str:
        if isinstance(node, FromContext):
            return "context"
        if isinstance(node, FromTransaction):
            return self._once(node.kind, f"context.unit_of_work.resource({self.name(node.kind)})")
        if node.provider.lifetime == "app":
            return self._constant(node)
        made = self._making(node)
        return self._bound(made) if node.provider.lifetime == "injection" else self._once(node.provider.key, made)

    def _constant(self, node: FromProvider) -> str:
        key = ("app", node.provider.key)
        if key not in self._made:
            self._made[key] = self.name(self._values.value(node))
        return self._made[key]

    def _making(self, node: FromProvider) -> str:
        provider = node.provider
        if provider.key in self._made and provider.lifetime == "message":
            return self._made[provider.key]
        fixed = "".join(f", {name}={self.name(value)}" for name, value in provider.fixed.items())
        call = f"{self.name(call_factory(provider))}({(self.arguments(node.arguments) + fixed).lstrip(', ')})"
        if provider.style == "async":
            return f"await {call}"
        if provider.style == "async generator":
            return f"await context.stack.enter_async_context({call})"
        if provider.style == "generator":
            return f"context.stack.enter_context({call})"
        return call

    def _once(self, key: Any, expression: str) -> str:
        if key not in self._made:
            self._made[key] = self._bound(expression)
        return self._made[key]

    def _bound(self, expression: str) -> str:
        variable = f"v{len(self._lines)}"
        self.line(f"{variable} = {expression}")
        return variable
