"""Every error of the library: the facts as attributes, a text in three parts (what, where, what to do) and a code.

The codes are explained one by one in docs/checks.md: 1xx definitions and start-up, 2xx dispatch, 3xx unit of work,
4xx stores, 5xx brokers, 6xx messages from the wire, 7xx plugins and settings.
"""

import re
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, ClassVar

from cqrs_decor._text import did_you_mean, listed


class CqrsDecorError(Exception):
    """Base of every error that this library raises on purpose.

    Attributes:
        code: Stable, e.g. `CD101`; its paragraph is in docs/checks.md.
        problem: What happened.
        where: The place in the user's code or configuration, or empty.
        fix: What to do about it, or empty.
    """

    code: ClassVar[str] = "CD000"

    def __init__(self, problem: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.problem]
        if self.where:
            lines.append(f"At: {self.where}.")
        lines.append(f"Fix: {self.fix} ({self.code})." if self.fix else f"({self.code})")
        return "\n".join(lines)


# --- control: raised by handlers ------------------------------------------------------------------------------------


class Park(Exception):  # noqa: N818 - it is an instruction, not a fault of the library
    """Raise it in a handler: trying again cannot help, park the message now with this reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class RetryLater(Exception):  # noqa: N818 - it is an instruction, not a fault of the library
    """Raise it in a handler: not now, try again after `delay`. It counts as an attempt.

    Args:
        delay: The wait before the next attempt; a number is seconds.
    """

    def __init__(self, delay: timedelta | float) -> None:
        self.delay = delay if isinstance(delay, timedelta) else timedelta(seconds=delay)
        super().__init__(f"try again after {self.delay.total_seconds():g} s")


# --- 1xx: definitions and start-up ----------------------------------------------------------------------------------


class StartupError(ExceptionGroup[CqrsDecorError]):
    """Everything that start-up found wrong, at once. Nothing was started."""

    def derive(self, excs: Sequence[Any], /) -> "StartupError":  # type: ignore[override]  # keeps the class in `except*`
        return StartupError(self.message, excs)

    def __str__(self) -> str:
        numbered = (f"{n}. " + str(error).replace("\n", "\n   ") for n, error in enumerate(self.exceptions, start=1))
        return "\n".join([self.message, *numbered])


class DefinitionError(CqrsDecorError):
    """Something a user declared cannot work."""


class NoHandlerError(DefinitionError):
    code = "CD101"

    def __init__(self, kind: str, message: str, type_path: str, known: Iterable[str], decorator: str) -> None:
        self.kind, self.message, self.known = kind, message, sorted(known)
        super().__init__(
            f"No handler for {kind} {message!r} ({type_path}).{did_you_mean(message, self.known)}\n"
            f"Handlers are known for: {listed(self.known)}.",
            fix=f"decorate one with @{decorator}, and list its module under the entry-point group "
            "'cqrs_decor.handlers' or name it in bootstrap()",
        )


def _unless_imported_twice(fix: str, places: Sequence[str]) -> str:
    """What to do about something that is there twice, unless it is the same file."""
    if not any(place.startswith("__main__.") for place in places):
        return fix
    return (
        "the program's own file was imported a second time, as a module: do not name it in bootstrap(...), "
        "or keep its handlers in a module of their own"
    )


class DuplicateHandlerError(DefinitionError):
    code = "CD102"

    def __init__(self, kind: str, message: str, places: Sequence[str]) -> None:
        self.kind, self.message, self.places = kind, message, tuple(places)
        super().__init__(
            f"{len(places)} handlers for {kind} {message!r}; it must have exactly one.",
            where=" and ".join(places),
            fix=_unless_imported_twice("remove all but one, or give each its own message class", places),
        )


class UnreadableAnnotationError(DefinitionError):
    code = "CD103"

    def __init__(self, where: str, parameter: str, reason: str) -> None:
        self.parameter, self.reason = parameter, reason
        super().__init__(
            f"The annotation of {parameter!r} cannot be read: {reason}.",
            where=where,
            fix="annotate it with a type that can be imported at run time (not only under TYPE_CHECKING)",
        )


class MissingDependencyError(DefinitionError):
    code = "CD104"

    def __init__(self, where: str, parameter: str, wanted: str, known: Iterable[str]) -> None:
        self.parameter, self.wanted = parameter, wanted
        super().__init__(
            f"Nobody provides {wanted} for parameter {parameter!r}.{did_you_mean(wanted, known)}",
            where=where,
            fix="register it in the container given to bootstrap(container=...), or decorate a function that returns "
            "it with @provider",
        )


class ReturnTypeMismatchError(DefinitionError):
    code = "CD105"

    def __init__(self, where: str, message: str, promised: str, returned: str) -> None:
        self.message, self.promised, self.returned = message, promised, returned
        super().__init__(
            f"{message} promises a result of type {promised}, but its handler returns {returned}.",
            where=where,
            fix=f"make the handler return {promised}, or change the type argument of {message}",
        )


class UnknownTopicError(DefinitionError):
    code = "CD106"

    def __init__(self, message: str, where: str = "") -> None:
        self.message = message
        name = message.rpartition(".")[2]
        super().__init__(
            f"Integration event {message!r} has no topic, so no broker can carry it.",
            where=where,
            fix=f'give one where the class is defined: class {name}(IntegrationEvent, topic="...")',
        )


class SyncHandlerWithAsyncResourceError(DefinitionError):
    code = "CD107"

    def __init__(self, where: str, parameter: str, resource: str, sync_resource: str | None) -> None:
        self.parameter, self.resource = parameter, resource
        instead = f", or ask for {sync_resource}" if sync_resource else ""
        super().__init__(
            f"A plain `def` handler asks for {resource} ({parameter!r}), which only `async def` code can use.",
            where=where,
            fix=f"write the handler with `async def`{instead}",
        )


class InvalidOptionError(DefinitionError):
    code = "CD108"

    def __init__(self, where: str, option: str, reason: str, fix: str) -> None:
        self.option = option
        super().__init__(f"Option {option!r} makes no sense here: {reason}.", where=where, fix=fix)


class ScopeMismatchError(DefinitionError):
    code = "CD109"

    def __init__(self, where: str, holder: str, held: str) -> None:
        self.holder, self.held = holder, held
        super().__init__(
            f"{holder} lives as long as the app, but depends on {held}, which lives for one message only.",
            where=where,
            fix=f'give {holder} the scope "message", or {held} the scope "app"',
        )


class MessageDefinitionError(DefinitionError):
    code = "CD110"

    def __init__(self, message: str, reason: str, fix: str) -> None:
        self.message, self.reason = message, reason
        super().__init__(f"Message {message}: {reason}.", fix=fix)


class HandlerDefinitionError(DefinitionError):
    code = "CD111"

    def __init__(self, where: str, reason: str, fix: str) -> None:
        self.reason = reason
        super().__init__(reason, where=where, fix=fix)


class DuplicateConsumerError(DefinitionError):
    code = "CD112"

    def __init__(self, name: str, places: Sequence[str]) -> None:
        self.name, self.places = name, tuple(places)
        super().__init__(
            f"Two consumers are named {name!r}; inbox rows are kept by that name, so each must be unique.",
            where=" and ".join(places),
            fix=_unless_imported_twice("give one of them another name: @event_handler(name=...)", places),
        )


class MissingResourceError(DefinitionError):
    code = "CD113"

    def __init__(self, where: str, parameter: str, resource: str) -> None:
        self.parameter, self.resource = parameter, resource
        super().__init__(
            f"Parameter {parameter!r} asks for {resource}, but the app has no database.",
            where=where,
            fix='name one: bootstrap(database="sqlite+aiosqlite:///app.db") or CQRS_DECOR_DATABASE; '
            "it needs pip install cqrs-decor-sqlalchemy",
        )


class DuplicateWireNameError(DefinitionError):
    code = "CD114"

    def __init__(self, topic: str, name: str, version: int, types: Sequence[str]) -> None:
        self.topic, self.name, self.version, self.types = topic, name, version, tuple(types)
        super().__init__(
            f"Event {name!r} version {version} on topic {topic!r} is claimed by {listed(types)}.",
            fix=_unless_imported_twice("give each class its own name= or version=", types),
        )


class MissingServiceNameError(DefinitionError):
    code = "CD115"

    def __init__(self, broker: str) -> None:
        self.broker = broker
        super().__init__(
            f"The app has no service name; {broker} needs one as the consumer group and the source of its events.",
            fix='give one: bootstrap(service="shop") or CQRS_DECOR_SERVICE=shop, and never change it',
        )


class DependencyCycleError(DefinitionError):
    code = "CD116"

    def __init__(self, where: str, cycle: Sequence[str]) -> None:
        self.cycle = tuple(cycle)
        super().__init__(
            f"Dependencies go round in a circle: {' -> '.join(cycle)}.",
            where=where,
            fix="break the circle, e.g. by passing what both need as a third object",
        )


class HandlerImportError(DefinitionError):
    code = "CD117"

    def __init__(self, module: str, origin: str, reason: str) -> None:
        self.module = module
        super().__init__(
            f"Module {module!r} with handlers cannot be imported: {reason}.",
            where=origin,
            fix="mend the import; the cause is chained to this error",
        )


# --- 2xx: dispatch --------------------------------------------------------------------------------------------------


class DispatchError(CqrsDecorError):
    """A message could not be dispatched."""


class AppNotStartedError(DispatchError):
    code = "CD201"

    def __init__(self, action: str) -> None:
        super().__init__(
            f"{action} was called before the app was started.",
            fix="enter it first: `async with app:` (in FastAPI: in the lifespan)",
        )


class AppStoppedError(DispatchError):
    code = "CD202"

    def __init__(self, action: str) -> None:
        super().__init__(
            f"{action} was called after the app was stopped.",
            fix="call it inside `async with app:`, or enter the app again",
        )


class WrongLoopError(DispatchError):
    code = "CD203"

    def __init__(self, action: str) -> None:
        super().__init__(
            f"{action} was called from another event loop or thread than the one that started the app.",
            fix="call it on the app's own loop; from a thread use anyio.from_thread.run(app.send, command)",
        )


class MessageValidationError(DispatchError):
    """A message does not fit its type. `faults` holds (field path, reason) pairs; values are never part of it."""

    code = "CD204"

    def __init__(self, message: str, faults: Sequence[tuple[str, str]]) -> None:
        self.message, self.faults = message, tuple(faults)
        detail = "; ".join(f"{path or '(body)'}: {reason}" for path, reason in self.faults)
        super().__init__(f"{message} is not valid: {detail}.", fix="send the fields that the class declares")


class WrongMessageKindError(DispatchError):
    code = "CD205"

    def __init__(self, message: str, kind: str, called: str, instead: str) -> None:
        self.message, self.kind = message, kind
        super().__init__(f"{message} is a {kind}; it cannot be given to {called}().", fix=instead)


class HandlerTimeoutError(DispatchError, TimeoutError):
    code = "CD206"

    def __init__(self, handler: str, limit_s: float) -> None:
        self.handler, self.limit_s = handler, limit_s
        super().__init__(
            f"Handler {handler} did not finish within {limit_s:g} s; its transaction was rolled back.",
            fix="make it faster, or give it more time with timeout=",
        )


class EventDepthError(DispatchError):
    code = "CD207"

    def __init__(self, limit: int, chain: Sequence[str]) -> None:
        self.limit, self.chain = limit, tuple(chain)
        super().__init__(
            f"Domain events follow domain events more than {limit} deep: {' -> '.join(chain)}.",
            fix="break the circle of events, or raise Settings.max_event_depth",
        )


class SendInQueryError(DispatchError):
    code = "CD208"

    def __init__(self, command: str, query: str) -> None:
        self.command, self.query = command, query
        super().__init__(
            f"Query {query} tried to send command {command}; a query changes nothing.",
            fix="send the command from a command or event handler",
        )


class IdempotencyKeyReusedError(DispatchError):
    code = "CD211"

    def __init__(self, command: str, key: str, how: str) -> None:
        self.command, self.key, self.how = command, key, how
        super().__init__(
            f"{command!r} was sent with idempotency key {key!r}, which was used before {how}.",
            fix="give every wish a key of its own, and repeat a wish with the content that it had",
        )


class IdempotentResultError(DispatchError):
    code = "CD212"

    def __init__(self, command: str, reason: str) -> None:
        self.command, self.reason = command, reason
        super().__init__(
            f"The result of {command!r} cannot be kept under an idempotency key: {reason}.",
            fix="let the command promise a type that pydantic writes as JSON and reads again, e.g. Command[str]",
        )


# --- 3xx: unit of work ----------------------------------------------------------------------------------------------


class UnitOfWorkError(CqrsDecorError):
    """The rules of the unit of work were broken; nothing was committed."""


class EmitOutsideHandlerError(UnitOfWorkError):
    code = "CD301"

    def __init__(self, event: str) -> None:
        self.event = event
        super().__init__(
            f"Event {event!r} was emitted outside a handler, so it belongs to no transaction.",
            fix="emit it inside a handler (or `async with app.unit_of_work():`), or store it in a transaction of your "
            "own with app.outbox.add(session, event)",
        )


class EmitAfterDispatchError(UnitOfWorkError):
    code = "CD302"

    def __init__(self, event: str, message: str) -> None:
        self.event, self.message = event, message
        super().__init__(
            f"Event {event!r} was emitted by a task that outlived the handler of {message!r}; "
            "its transaction has ended.",
            fix="await the task before the handler returns, or store the event in a transaction of its own with "
            "app.publish(event) or app.outbox.add(session, event)",
        )


class EmitInQueryError(UnitOfWorkError):
    code = "CD303"

    def __init__(self, event: str, query: str) -> None:
        self.event, self.query = event, query
        super().__init__(
            f"Query {query!r} tried to emit {event!r}; a query changes nothing.",
            fix="emit events from commands and event handlers only",
        )


class TransactionControlError(UnitOfWorkError):
    code = "CD304"

    def __init__(self, action: str) -> None:
        self.action = action
        super().__init__(
            f"A handler called {action}(); the transaction begins before the handler and is committed after it.",
            fix="leave it out; use `session.begin_nested()` for a part that may fail, or raise to roll back",
        )


class AutocommitRefusedError(UnitOfWorkError):
    code = "CD305"

    def __init__(self, where: str) -> None:
        super().__init__(
            "The connection is in AUTOCOMMIT mode, where business rows and events cannot be one transaction.",
            where=where,
            fix="use an engine with a transactional isolation level",
        )


class CommitOutcomeUnknownError(UnitOfWorkError):
    code = "CD306"

    def __init__(self, store: str, what: str = "broke") -> None:
        self.store = store
        super().__init__(
            f"The connection to {store} {what} during COMMIT: the transaction may or may not have been committed.",
            fix="look before you repeat; what is sent with an idempotency_key can be repeated safely",
        )


class JoinedDispatchFailedError(UnitOfWorkError):
    code = "CD307"

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(
            f"A joined dispatch of {message!r} failed and its error was swallowed; "
            "its half-done work was not committed.",
            fix="let the error pass, or send it inside `async with session.begin_nested():`",
        )


class UnitOfWorkClosedError(UnitOfWorkError):
    code = "CD308"

    def __init__(self, wanted: str) -> None:
        self.wanted = wanted
        super().__init__(
            f"{wanted} was asked of a unit of work that has ended.", fix="use it before the handler or the block ends"
        )


class ReadOnlyViolationError(UnitOfWorkError):
    code = "CD309"

    def __init__(self, query: str) -> None:
        self.query = query
        super().__init__(f"Query {query!r} tried to write.", fix="make it a command")


# --- 4xx: stores ----------------------------------------------------------------------------------------------------


class StoreError(CqrsDecorError):
    """A database could not do what was asked. Texts never hold a password: `store` is a masked URL."""


class StoreUnavailableError(StoreError):
    code = "CD401"

    def __init__(self, store: str, reason: str) -> None:
        self.store, self.reason = store, reason
        super().__init__(
            f"Database {store} cannot be reached: {reason}.", fix="see that it runs and that host and port are right"
        )


class StoreAccessError(StoreError):
    code = "CD402"

    def __init__(self, store: str, reason: str) -> None:
        self.store, self.reason = store, reason
        super().__init__(
            f"Database {store} refused access: {reason}.", fix="check user, password, database name and grants"
        )


class SchemaMissingError(StoreError):
    code = "CD403"

    def __init__(self, store: str, tables: Sequence[str]) -> None:
        self.store, self.tables = store, tuple(tables)
        super().__init__(
            f"Database {store} lacks the tables {listed(tables)}.",
            fix="run `cqrs-decor db upgrade`, or add them to your migrations (`cqrs-decor db plan` prints the SQL)",
        )


class SchemaOutdatedError(StoreError):
    code = "CD404"

    def __init__(self, store: str, found: int, needed: int) -> None:
        self.store, self.found, self.needed = store, found, needed
        super().__init__(
            f"Database {store} has schema version {found}, this library needs {needed}.",
            fix="run `cqrs-decor db upgrade`" if found < needed else "upgrade cqrs-decor in this service",
        )


class LaneLostError(StoreError):
    """Another relay holds a lane under a higher fencing number; the write was refused."""

    code = "CD405"

    def __init__(self, owner: str, lanes: Sequence[int]) -> None:
        self.owner, self.lanes = owner, tuple(lanes)
        super().__init__(
            f"Relay {owner} no longer holds lanes {', '.join(map(str, sorted(lanes)))}; nothing was written.",
            fix="none needed: the new owner carries on; if it happens often, lengthen the lease",
        )


class UnsafeDatabaseSetupError(StoreError):
    code = "CD406"

    def __init__(self, store: str, reason: str, fix: str) -> None:
        self.store, self.reason = store, reason
        super().__init__(f"Database {store} is set up in a way that cannot keep the promises: {reason}.", fix=fix)


class RecordKillsRelaysError(StoreError):
    """Relays vanish, one after another, while they publish this record: it is parked instead of tried once more."""

    code = "CD410"

    def __init__(self, record_id: int, type: str, crashes: int) -> None:
        self.record_id, self.type, self.crashes = record_id, type, crashes
        super().__init__(
            f"{crashes} relays in a row vanished with record {record_id} ({type}) in hand, alone at the last.",
            fix="find out in their logs, or the kernel's, what ended them; then `cqrs-decor outbox retry` or `discard`",
        )


class UnreadableRecordError(StoreError):
    """A row of the outbox is no message: it is parked instead of published."""

    code = "CD411"

    def __init__(self, record_id: int, reason: str) -> None:
        self.record_id, self.reason = record_id, reason
        super().__init__(
            f"Outbox record {record_id} cannot be read: {reason}.",
            fix="find out who writes rows by hand; correct the row and `cqrs-decor outbox retry` it, or `discard` it",
        )


class UnknownRecordError(StoreError):
    code = "CD407"

    def __init__(self, kind: str, ids: Sequence[str]) -> None:
        self.kind, self.ids = kind, tuple(ids)
        super().__init__(f"No {kind} record with id {listed(ids)}.", fix=f"list them with `cqrs-decor {kind} list`")


# --- 5xx: brokers ---------------------------------------------------------------------------------------------------


class BrokerError(CqrsDecorError):
    """A broker could not do what was asked."""


class BrokerUnavailableError(BrokerError):
    """The broker cannot be reached or is not ready. It says nothing about any record; trying again is safe."""

    code = "CD501"

    def __init__(self, broker: str, reason: str) -> None:
        self.broker, self.reason = broker, reason
        super().__init__(
            f"Broker {broker} cannot be reached: {reason}.", fix="see that it runs and that its address is right"
        )


class BrokerAccessError(BrokerError):
    code = "CD502"

    def __init__(self, broker: str, reason: str) -> None:
        self.broker, self.reason = broker, reason
        super().__init__(
            f"Broker {broker} refused access: {reason}.", fix="check user, password, certificates and ACLs"
        )


class TopicMissingError(BrokerError):
    code = "CD503"

    def __init__(self, broker: str, topics: Sequence[str]) -> None:
        self.broker, self.topics = broker, tuple(topics)
        super().__init__(
            f"Broker {broker} lacks the topics {listed(topics)}.", fix="create them: `cqrs-decor topics create`"
        )


class RecordRejectedError(BrokerError):
    """The broker will not take this one record; the others are unaffected."""

    code = "CD504"

    def __init__(self, broker: str, topic: str, reason: str) -> None:
        self.broker, self.topic, self.reason = broker, topic, reason
        super().__init__(
            f"Broker {broker} refused a record for topic {topic!r}: {reason}.",
            fix="mend the cause, then retry it: `cqrs-decor outbox retry`",
        )


class RecordTooLargeError(RecordRejectedError):
    code = "CD505"

    def __init__(self, broker: str, topic: str, size: int, limit: int) -> None:
        self.size, self.limit = size, limit
        super().__init__(broker, topic, f"it has {size:,} bytes, the limit is {limit:,}")


class BrokerVersionError(BrokerError):
    code = "CD506"

    def __init__(self, broker: str, reason: str) -> None:
        self.broker, self.reason = broker, reason
        super().__init__(
            f"Broker {broker} does not speak what this plugin needs: {reason}.",
            fix="use a supported version, or check its security protocol",
        )


# --- 6xx: messages from the wire ------------------------------------------------------------------------------------


class WireError(CqrsDecorError):
    """A message that came in cannot be handled as it is. The worker parks it with this reason."""


class MalformedEnvelopeError(WireError):
    code = "CD601"

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"The message has no usable CloudEvents envelope: {reason}.",
            fix="mend the producer, or discard it: `cqrs-decor inbox discard`",
        )


class UndecodableBodyError(WireError):
    code = "CD602"

    def __init__(self, message: str, reason: str) -> None:
        self.message, self.reason = message, reason
        super().__init__(
            f"The body of {message!r} cannot be read: {reason}.",
            fix="mend the producer, or discard it: `cqrs-decor inbox discard`",
        )


class UnknownMessageTypeError(WireError):
    code = "CD603"

    def __init__(self, topic: str, name: str, known: Iterable[str]) -> None:
        self.topic, self.name, self.known = topic, name, sorted(known)
        super().__init__(
            f"Nothing here knows event {name!r} of topic {topic!r}.{did_you_mean(name, self.known)}\n"
            f"Known on that topic: {listed(self.known)}.",
            fix='declare its class with the same topic and name, or set unknown_events="ignore"',
        )


class UnknownVersionError(WireError):
    code = "CD604"

    def __init__(self, name: str, version: int, known: Sequence[int]) -> None:
        self.name, self.version, self.known = name, version, tuple(known)
        super().__init__(
            f"Event {name!r} came in version {version}; this service knows {listed(map(str, known))}.",
            fix="deploy a service that knows the version, then `cqrs-decor inbox retry`",
        )


class PayloadInvalidError(WireError):
    code = "CD605"

    def __init__(self, message: str, faults: Sequence[tuple[str, str]]) -> None:
        self.message, self.faults = message, tuple(faults)
        detail = "; ".join(f"{path or '(body)'}: {reason}" for path, reason in self.faults)
        super().__init__(
            f"The body of {message!r} does not fit its class: {detail}.",
            fix="mend the producer or the class, then `cqrs-decor inbox retry`",
        )


class BodyTooLargeError(WireError):
    code = "CD606"

    def __init__(self, size: int, limit: int) -> None:
        self.size, self.limit = size, limit
        super().__init__(
            f"The body has {size:,} bytes, more than the {limit:,} that this service takes.",
            fix="raise Settings.max_body_bytes, or send a reference instead of the content",
        )


class MessageKillsWorkersError(WireError):
    """Workers vanish, one after another, while they handle this message: it is parked instead of tried once more."""

    code = "CD607"

    def __init__(self, crashes: int) -> None:
        self.crashes = crashes
        super().__init__(
            f"{crashes} workers in a row vanished with this message in hand, and with nothing else.",
            fix="find out in their logs, or the kernel's, what ended them; then `cqrs-decor inbox retry` or `discard`",
        )


# --- 7xx: plugins and settings --------------------------------------------------------------------------------------


_SECRET = re.compile(r"((?://|:)[^:/@]*:).*@")
"""What stands between a user's name and the host of a URL, however broken the rest of it is."""


class ConfigurationError(CqrsDecorError):
    """The configuration cannot be followed."""


class UnknownPluginError(ConfigurationError):
    code = "CD701"

    def __init__(self, kind: str, name: str, installed: Iterable[str], package: str | None) -> None:
        self.kind, self.name, self.installed, self.package = kind, name, sorted(installed), package
        fix = (
            f"pip install {package}" if package else "install the plugin that has it, or use one of the installed names"
        )
        super().__init__(
            f"No {kind} named {name!r} is installed.{did_you_mean(name, self.installed)}\n"
            f"Installed: {listed(self.installed)}.",
            fix=fix,
        )


class BrokenPluginError(ConfigurationError):
    code = "CD702"

    def __init__(self, name: str, distribution: str, version: str, entry_point: str, reason: str) -> None:
        self.name, self.distribution, self.version, self.entry_point = name, distribution, version, entry_point
        super().__init__(
            f"Plugin {name!r} of {distribution} {version} cannot be loaded: {reason}.",
            where=entry_point,
            fix="mend or reinstall it; the cause is chained to this error",
        )


class ConflictingPluginsError(ConfigurationError):
    code = "CD703"

    def __init__(self, kind: str, name: str, distributions: Sequence[str]) -> None:
        self.kind, self.name, self.distributions = kind, name, tuple(distributions)
        super().__init__(
            f"{kind.capitalize()} {name!r} is claimed by {listed(distributions)}.", fix="uninstall all but one of them"
        )


class BadUrlError(ConfigurationError):
    code = "CD704"

    def __init__(self, what: str, url: str, reason: str, example: str) -> None:
        url = _SECRET.sub(r"\1***@", url)
        self.what, self.url, self.reason = what, url, reason
        super().__init__(f"The {what} URL {url!r} cannot be read: {reason}.", fix=f"write it like {example}")


class SettingError(ConfigurationError):
    code = "CD705"

    def __init__(self, setting: str, reason: str, fix: str, *, where: str = "") -> None:
        self.setting, self.reason = setting, reason
        super().__init__(f"Setting {setting}: {reason}.", where=where, fix=fix)


class UnsupportedError(ConfigurationError):
    code = "CD706"

    def __init__(self, part: str, feature: str, fix: str) -> None:
        self.part, self.feature = part, feature
        super().__init__(f"{part} cannot {feature}.", fix=fix)


_MAY_QUOTE = {
    "union_tag_invalid": "its tag is none of those expected",
    "value_error": "a validator of the class refuses it",
    "assertion_error": "a validator of the class refuses it",
}


def validation_faults(errors: Sequence[Any], *, quotes_nothing: bool = False) -> list[tuple[str, str]]:
    """Turn pydantic's error list into (field path, reason) pairs, leaving the values out.

    Args:
        errors: As `ValidationError.errors()` gives them.
        quotes_nothing: Also leave out the words of the user's own validators, which may quote a value.
    """

    def reason(error: Any) -> str:
        kind = error.get("type", "")
        hidden = kind in _MAY_QUOTE and (quotes_nothing or kind == "union_tag_invalid")
        return _MAY_QUOTE[kind] if hidden else str(error["msg"])

    return [(".".join(str(part) for part in error["loc"]), reason(error)) for error in errors]
