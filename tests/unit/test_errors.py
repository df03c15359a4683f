"""Every error's text is read here: what happened, where, what to do, and a code that has a paragraph in the docs."""

import inspect
from datetime import timedelta
from typing import Any

import pytest

from cqrs_decor import errors
from cqrs_decor.errors import (
    AppNotStartedError,
    AppStoppedError,
    AutocommitRefusedError,
    BadUrlError,
    BodyTooLargeError,
    BrokenPluginError,
    BrokerAccessError,
    BrokerUnavailableError,
    BrokerVersionError,
    CommitOutcomeUnknownError,
    ConflictingPluginsError,
    CqrsDecorError,
    DependencyCycleError,
    DuplicateConsumerError,
    DuplicateHandlerError,
    DuplicateWireNameError,
    EmitAfterDispatchError,
    EmitInQueryError,
    EmitOutsideHandlerError,
    EventDepthError,
    HandlerDefinitionError,
    HandlerImportError,
    HandlerTimeoutError,
    IdempotencyKeyReusedError,
    IdempotentResultError,
    InvalidOptionError,
    JoinedDispatchFailedError,
    LaneLostError,
    MalformedEnvelopeError,
    MessageDefinitionError,
    MessageKillsWorkersError,
    MessageValidationError,
    MissingDependencyError,
    MissingResourceError,
    MissingServiceNameError,
    NoHandlerError,
    Park,
    PayloadInvalidError,
    ReadOnlyViolationError,
    RecordKillsRelaysError,
    RecordRejectedError,
    RecordTooLargeError,
    RetryLater,
    ReturnTypeMismatchError,
    SchemaMissingError,
    SchemaOutdatedError,
    ScopeMismatchError,
    SendInQueryError,
    SettingError,
    StartupError,
    StoreAccessError,
    StoreUnavailableError,
    SyncHandlerWithAsyncResourceError,
    TopicMissingError,
    TransactionControlError,
    UndecodableBodyError,
    UnitOfWorkClosedError,
    UnknownMessageTypeError,
    UnknownPluginError,
    UnknownRecordError,
    UnknownTopicError,
    UnknownVersionError,
    UnreadableAnnotationError,
    UnreadableRecordError,
    UnsafeDatabaseSetupError,
    UnsupportedError,
    WrongLoopError,
    WrongMessageKindError,
    validation_faults,
)

CASES: list[tuple[CqrsDecorError, str]] = [
    (
        RecordKillsRelaysError(17, "shop.order-placed", 3),
        "3 relays in a row vanished with record 17 (shop.order-placed) in hand, alone at the last.\n"
        "Fix: find out in their logs, or the kernel's, what ended them; "
        "then `cqrs-decor outbox retry` or `discard` (CD410).",
    ),
    (
        UnreadableRecordError(17, "its headers have no time"),
        "Outbox record 17 cannot be read: its headers have no time.\n"
        "Fix: find out who writes rows by hand; correct the row and `cqrs-decor outbox retry` it, "
        "or `discard` it (CD411).",
    ),
    (
        NoHandlerError(
            "command",
            "billing.isue-invoice",
            "shop.billing.IssueInvoice",
            ["billing.void-invoice", "billing.issue-invoice"],
            "command_handler",
        ),
        "No handler for command 'billing.isue-invoice' (shop.billing.IssueInvoice). Did you mean "
        "'billing.issue-invoice'?\n"
        "Handlers are known for: billing.issue-invoice, billing.void-invoice.\n"
        "Fix: decorate one with @command_handler, and list its module under the entry-point group "
        "'cqrs_decor.handlers' or name it in bootstrap() (CD101).",
    ),
    (
        DuplicateHandlerError("command", "PlaceOrder", ["shop/a.py:3", "shop/b.py:7"]),
        "2 handlers for command 'PlaceOrder'; it must have exactly one.\n"
        "At: shop/a.py:3 and shop/b.py:7.\n"
        "Fix: remove all but one, or give each its own message class (CD102).",
    ),
    (
        UnreadableAnnotationError("shop.place_order", "session", "name 'AsyncSession' is not defined"),
        "The annotation of 'session' cannot be read: name 'AsyncSession' is not defined.\n"
        "At: shop.place_order.\n"
        "Fix: annotate it with a type that can be imported at run time (not only under TYPE_CHECKING) "
        "(CD103).",
    ),
    (
        MissingDependencyError("shop.place_order", "stock", "StockClient", ["StockClients", "Mailer"]),
        "Nobody provides StockClient for parameter 'stock'. Did you mean 'StockClients'?\n"
        "At: shop.place_order.\n"
        "Fix: register it in the container given to bootstrap(container=...), or decorate a function "
        "that returns it with @provider (CD104).",
    ),
    (
        ReturnTypeMismatchError("shop.place_order", "PlaceOrder", "int", "str"),
        "PlaceOrder promises a result of type int, but its handler returns str.\n"
        "At: shop.place_order.\n"
        "Fix: make the handler return int, or change the type argument of PlaceOrder (CD105).",
    ),
    (
        UnknownTopicError("shop.events.OrderPlaced", "shop.place_order"),
        "Integration event 'shop.events.OrderPlaced' has no topic, so no broker can carry it.\n"
        "At: shop.place_order.\n"
        'Fix: give one where the class is defined: class OrderPlaced(IntegrationEvent, topic="...") '
        "(CD106).",
    ),
    (
        SyncHandlerWithAsyncResourceError("shop.place_order", "session", "AsyncSession", "Session"),
        "A plain `def` handler asks for AsyncSession ('session'), which only `async def` code can use.\n"
        "At: shop.place_order.\n"
        "Fix: write the handler with `async def`, or ask for Session (CD107).",
    ),
    (
        SyncHandlerWithAsyncResourceError("shop.place_order", "session", "AsyncSession", None),
        "A plain `def` handler asks for AsyncSession ('session'), which only `async def` code can use.\n"
        "At: shop.place_order.\n"
        "Fix: write the handler with `async def` (CD107).",
    ),
    (
        InvalidOptionError("shop.get_order", "retry", "a query is asked again by its caller", "leave it out"),
        "Option 'retry' makes no sense here: a query is asked again by its caller.\n"
        "At: shop.get_order.\n"
        "Fix: leave it out (CD108).",
    ),
    (
        ScopeMismatchError("shop.Mailer", "Mailer", "AsyncSession"),
        "Mailer lives as long as the app, but depends on AsyncSession, which lives for one message only.\n"
        "At: shop.Mailer.\n"
        'Fix: give Mailer the scope "message", or AsyncSession the scope "app" (CD109).',
    ),
    (
        MessageDefinitionError("shop.OrderPlaced", "key='id' is none of its fields", "name one of sku"),
        "Message shop.OrderPlaced: key='id' is none of its fields.\nFix: name one of sku (CD110).",
    ),
    (
        HandlerDefinitionError("shop.place_order", "It takes no message.", "give it one as first parameter"),
        "It takes no message.\nAt: shop.place_order.\nFix: give it one as first parameter (CD111).",
    ),
    (
        DuplicateConsumerError("shop.send_mail", ["shop/a.py:3", "shop/b.py:7"]),
        "Two consumers are named 'shop.send_mail'; inbox rows are kept by that name, so each must be "
        "unique.\n"
        "At: shop/a.py:3 and shop/b.py:7.\n"
        "Fix: give one of them another name: @event_handler(name=...) (CD112).",
    ),
    (
        DuplicateConsumerError("shop.pack", ["__main__.pack (shop.py:14)", "shop.pack (shop.py:14)"]),
        "Two consumers are named 'shop.pack'; inbox rows are kept by that name, so each must be unique.\n"
        "At: __main__.pack (shop.py:14) and shop.pack (shop.py:14).\n"
        "Fix: the program's own file was imported a second time, as a module: do not name it in "
        "bootstrap(...), or keep its handlers in a module of their own (CD112).",
    ),
    (
        MissingResourceError("shop.place_order", "session", "AsyncSession"),
        "Parameter 'session' asks for AsyncSession, but the app has no database.\n"
        "At: shop.place_order.\n"
        'Fix: name one: bootstrap(database="sqlite+aiosqlite:///app.db") or CQRS_DECOR_DATABASE; it '
        "needs pip install cqrs-decor-sqlalchemy (CD113).",
    ),
    (
        DuplicateWireNameError("orders", "shop.order-placed", 2, ["shop.B", "shop.A"]),
        "Event 'shop.order-placed' version 2 on topic 'orders' is claimed by shop.A, shop.B.\n"
        "Fix: give each class its own name= or version= (CD114).",
    ),
    (
        MissingServiceNameError("kafka://k1:9092"),
        "The app has no service name; kafka://k1:9092 needs one as the consumer group and the source of "
        "its events.\n"
        'Fix: give one: bootstrap(service="shop") or CQRS_DECOR_SERVICE=shop, and never change it '
        "(CD115).",
    ),
    (
        DependencyCycleError("shop/a.py:3", ["A", "B", "A"]),
        "Dependencies go round in a circle: A -> B -> A.\n"
        "At: shop/a.py:3.\n"
        "Fix: break the circle, e.g. by passing what both need as a third object (CD116).",
    ),
    (
        HandlerImportError("shop.handlers", "entry point 'shop'", "No module named 'shop'"),
        "Module 'shop.handlers' with handlers cannot be imported: No module named 'shop'.\n"
        "At: entry point 'shop'.\n"
        "Fix: mend the import; the cause is chained to this error (CD117).",
    ),
    (
        AppNotStartedError("send"),
        "send was called before the app was started.\n"
        "Fix: enter it first: `async with app:` (in FastAPI: in the lifespan) (CD201).",
    ),
    (
        AppStoppedError("send"),
        "send was called after the app was stopped.\n"
        "Fix: call it inside `async with app:`, or enter the app again (CD202).",
    ),
    (
        WrongLoopError("send"),
        "send was called from another event loop or thread than the one that started the app.\n"
        "Fix: call it on the app's own loop; from a thread use anyio.from_thread.run(app.send, command) "
        "(CD203).",
    ),
    (
        MessageValidationError("PlaceOrder", [("lines.0.sku", "Field required"), ("", "not an object")]),
        "PlaceOrder is not valid: lines.0.sku: Field required; (body): not an object.\n"
        "Fix: send the fields that the class declares (CD204).",
    ),
    (
        WrongMessageKindError("GetOrder", "query", "send", "use ask(GetOrder(...))"),
        "GetOrder is a query; it cannot be given to send().\nFix: use ask(GetOrder(...)) (CD205).",
    ),
    (
        HandlerTimeoutError("shop.place_order", 2.5),
        "Handler shop.place_order did not finish within 2.5 s; its transaction was rolled back.\n"
        "Fix: make it faster, or give it more time with timeout= (CD206).",
    ),
    (
        EventDepthError(2, ["A", "B", "A"]),
        "Domain events follow domain events more than 2 deep: A -> B -> A.\n"
        "Fix: break the circle of events, or raise Settings.max_event_depth (CD207).",
    ),
    (
        SendInQueryError("PlaceOrder", "GetOrder"),
        "Query GetOrder tried to send command PlaceOrder; a query changes nothing.\n"
        "Fix: send the command from a command or event handler (CD208).",
    ),
    (
        EmitOutsideHandlerError("OrderPlaced"),
        "Event 'OrderPlaced' was emitted outside a handler, so it belongs to no transaction.\n"
        "Fix: emit it inside a handler (or `async with app.unit_of_work():`), or store it in a "
        "transaction of your own with app.outbox.add(session, event) (CD301).",
    ),
    (
        EmitAfterDispatchError("OrderPlaced", "PlaceOrder"),
        "Event 'OrderPlaced' was emitted by a task that outlived the handler of 'PlaceOrder'; its "
        "transaction has ended.\n"
        "Fix: await the task before the handler returns, or store the event in a transaction of its own "
        "with app.publish(event) or app.outbox.add(session, event) (CD302).",
    ),
    (
        EmitInQueryError("OrderPlaced", "GetOrder"),
        "Query 'GetOrder' tried to emit 'OrderPlaced'; a query changes nothing.\n"
        "Fix: emit events from commands and event handlers only (CD303).",
    ),
    (
        TransactionControlError("commit"),
        "A handler called commit(); the transaction begins before the handler and is committed after it.\n"
        "Fix: leave it out; use `session.begin_nested()` for a part that may fail, or raise to roll back"
        " (CD304).",
    ),
    (
        AutocommitRefusedError("bootstrap(database=...)"),
        "The connection is in AUTOCOMMIT mode, where business rows and events cannot be one transaction.\n"
        "At: bootstrap(database=...).\n"
        "Fix: use an engine with a transactional isolation level (CD305).",
    ),
    (
        IdempotencyKeyReusedError("PlaceOrder", "order-1", "for another command or other content"),
        "'PlaceOrder' was sent with idempotency key 'order-1', which was used before for another command or other "
        "content.\n"
        "Fix: give every wish a key of its own, and repeat a wish with the content that it had (CD211).",
    ),
    (
        IdempotentResultError("PlaceOrder", "what was kept cannot be read"),
        "The result of 'PlaceOrder' cannot be kept under an idempotency key: what was kept cannot be read.\n"
        "Fix: let the command promise a type that pydantic writes as JSON and reads again, e.g. Command[str] (CD212).",
    ),
    (
        CommitOutcomeUnknownError("postgresql://db/shop"),
        "The connection to postgresql://db/shop broke during COMMIT: the transaction may or may not have"
        " been committed.\n"
        "Fix: look before you repeat; what is sent with an idempotency_key can be repeated safely (CD306).",
    ),
    (
        JoinedDispatchFailedError("PlaceOrder"),
        "A joined dispatch of 'PlaceOrder' failed and its error was swallowed; its half-done work was "
        "not committed.\n"
        "Fix: let the error pass, or send it inside `async with session.begin_nested():` (CD307).",
    ),
    (
        UnitOfWorkClosedError("AsyncSession"),
        "AsyncSession was asked of a unit of work that has ended.\n"
        "Fix: use it before the handler or the block ends (CD308).",
    ),
    (
        ReadOnlyViolationError("GetOrder"),
        "Query 'GetOrder' tried to write.\nFix: make it a command (CD309).",
    ),
    (
        StoreUnavailableError("postgresql://db/shop", "connection refused"),
        "Database postgresql://db/shop cannot be reached: connection refused.\n"
        "Fix: see that it runs and that host and port are right (CD401).",
    ),
    (
        StoreAccessError("postgresql://db/shop", "password authentication failed"),
        "Database postgresql://db/shop refused access: password authentication failed.\n"
        "Fix: check user, password, database name and grants (CD402).",
    ),
    (
        SchemaMissingError("postgresql://db/shop", ["cqrs_outbox", "cqrs_inbox"]),
        "Database postgresql://db/shop lacks the tables cqrs_inbox, cqrs_outbox.\n"
        "Fix: run `cqrs-decor db upgrade`, or add them to your migrations (`cqrs-decor db plan` prints "
        "the SQL) (CD403).",
    ),
    (
        SchemaOutdatedError("postgresql://db/shop", 1, 2),
        "Database postgresql://db/shop has schema version 1, this library needs 2.\n"
        "Fix: run `cqrs-decor db upgrade` (CD404).",
    ),
    (
        SchemaOutdatedError("postgresql://db/shop", 3, 2),
        "Database postgresql://db/shop has schema version 3, this library needs 2.\n"
        "Fix: upgrade cqrs-decor in this service (CD404).",
    ),
    (
        LaneLostError("relay-1", [3, 4]),
        "Relay relay-1 no longer holds lanes 3, 4; nothing was written.\n"
        "Fix: none needed: the new owner carries on; if it happens often, lengthen the lease (CD405).",
    ),
    (
        UnsafeDatabaseSetupError("sqlite:///shop.db", "it begins transactions late", "use the engine of the plugin"),
        "Database sqlite:///shop.db is set up in a way that cannot keep the promises: it begins "
        "transactions late.\n"
        "Fix: use the engine of the plugin (CD406).",
    ),
    (
        UnknownRecordError("outbox", ["17"]),
        "No outbox record with id 17.\nFix: list them with `cqrs-decor outbox list` (CD407).",
    ),
    (
        BrokerUnavailableError("kafka://k1:9092", "connection refused"),
        "Broker kafka://k1:9092 cannot be reached: connection refused.\n"
        "Fix: see that it runs and that its address is right (CD501).",
    ),
    (
        BrokerAccessError("kafka://k1:9092", "topic authorization failed"),
        "Broker kafka://k1:9092 refused access: topic authorization failed.\n"
        "Fix: check user, password, certificates and ACLs (CD502).",
    ),
    (
        TopicMissingError("kafka://k1:9092", ["stock", "orders"]),
        "Broker kafka://k1:9092 lacks the topics orders, stock.\nFix: create them: `cqrs-decor topics create` (CD503).",
    ),
    (
        RecordRejectedError("kafka://k1:9092", "orders", "policy violation"),
        "Broker kafka://k1:9092 refused a record for topic 'orders': policy violation.\n"
        "Fix: mend the cause, then retry it: `cqrs-decor outbox retry` (CD504).",
    ),
    (
        RecordTooLargeError("kafka://k1:9092", "orders", 2000000, 1048576),
        "Broker kafka://k1:9092 refused a record for topic 'orders': it has 2,000,000 bytes, the limit "
        "is 1,048,576.\n"
        "Fix: mend the cause, then retry it: `cqrs-decor outbox retry` (CD505).",
    ),
    (
        BrokerVersionError("kafka://k1:9092", "version 0.9"),
        "Broker kafka://k1:9092 does not speak what this plugin needs: version 0.9.\n"
        "Fix: use a supported version, or check its security protocol (CD506).",
    ),
    (
        MalformedEnvelopeError("attributes missing: id"),
        "The message has no usable CloudEvents envelope: attributes missing: id.\n"
        "Fix: mend the producer, or discard it: `cqrs-decor inbox discard` (CD601).",
    ),
    (
        UndecodableBodyError("OrderPlaced", "it is not JSON"),
        "The body of 'OrderPlaced' cannot be read: it is not JSON.\n"
        "Fix: mend the producer, or discard it: `cqrs-decor inbox discard` (CD602).",
    ),
    (
        UnknownMessageTypeError("orders", "shop.order-place", ["shop.order-placed"]),
        "Nothing here knows event 'shop.order-place' of topic 'orders'. Did you mean "
        "'shop.order-placed'?\n"
        "Known on that topic: shop.order-placed.\n"
        'Fix: declare its class with the same topic and name, or set unknown_events="ignore" (CD603).',
    ),
    (
        UnknownVersionError("shop.order-placed", 3, [1, 2]),
        "Event 'shop.order-placed' came in version 3; this service knows 1, 2.\n"
        "Fix: deploy a service that knows the version, then `cqrs-decor inbox retry` (CD604).",
    ),
    (
        PayloadInvalidError("OrderPlaced", [("lines.0.sku", "Field required"), ("", "not an object")]),
        "The body of 'OrderPlaced' does not fit its class: lines.0.sku: Field required; (body): not an "
        "object.\n"
        "Fix: mend the producer or the class, then `cqrs-decor inbox retry` (CD605).",
    ),
    (
        BodyTooLargeError(2000000, 1048576),
        "The body has 2,000,000 bytes, more than the 1,048,576 that this service takes.\n"
        "Fix: raise Settings.max_body_bytes, or send a reference instead of the content (CD606).",
    ),
    (
        MessageKillsWorkersError(3),
        "3 workers in a row vanished with this message in hand, and with nothing else.\n"
        "Fix: find out in their logs, or the kernel's, what ended them; then `cqrs-decor inbox retry` or `discard` "
        "(CD607).",
    ),
    (
        UnknownPluginError("broker", "kafak", ["memory", "kafka"], None),
        "No broker named 'kafak' is installed. Did you mean 'kafka'?\n"
        "Installed: kafka, memory.\n"
        "Fix: install the plugin that has it, or use one of the installed names (CD701).",
    ),
    (
        UnknownPluginError("broker", "kafka", ["memory"], "cqrs-decor-kafka"),
        "No broker named 'kafka' is installed.\nInstalled: memory.\nFix: pip install cqrs-decor-kafka (CD701).",
    ),
    (
        BrokenPluginError(
            "kafka", "cqrs-decor-kafka", "0.1.0", "cqrs_decor_kafka:KafkaBroker", "No module named 'aiokafka'"
        ),
        "Plugin 'kafka' of cqrs-decor-kafka 0.1.0 cannot be loaded: No module named 'aiokafka'.\n"
        "At: cqrs_decor_kafka:KafkaBroker.\n"
        "Fix: mend or reinstall it; the cause is chained to this error (CD702).",
    ),
    (
        ConflictingPluginsError("broker", "kafka", ["b-kafka", "a-kafka"]),
        "Broker 'kafka' is claimed by a-kafka, b-kafka.\nFix: uninstall all but one of them (CD703).",
    ),
    (
        BadUrlError("broker", "kafka:/k1", "it has no host", "kafka://localhost:9092"),
        "The broker URL 'kafka:/k1' cannot be read: it has no host.\n"
        "Fix: write it like kafka://localhost:9092 (CD704).",
    ),
    (
        SettingError(
            "max_body_bytes", "it must be positive", "give a number above 0", where="CQRS_DECOR_MAX_BODY_BYTES"
        ),
        "Setting max_body_bytes: it must be positive.\n"
        "At: CQRS_DECOR_MAX_BODY_BYTES.\n"
        "Fix: give a number above 0 (CD705).",
    ),
    (
        UnsupportedError("The store in memory", "give a session", "name a database"),
        "The store in memory cannot give a session.\nFix: name a database (CD706).",
    ),
]


def own_codes() -> dict[str, list[str]]:
    """Code -> the classes that define it."""
    codes: dict[str, list[str]] = {}
    for name, thing in vars(errors).items():
        if inspect.isclass(thing) and issubclass(thing, CqrsDecorError) and "code" in vars(thing):
            codes.setdefault(thing.code, []).append(name)
    return codes


@pytest.mark.parametrize(("error", "text"), CASES, ids=[type(error).__name__ for error, _ in CASES])
def test_an_error_says_what_happened_where_and_what_to_do(error: CqrsDecorError, text: str) -> None:
    """It is read at night by somebody who did not write the code."""
    assert str(error) == text


def test_every_error_class_is_read_above() -> None:
    """A text that nobody has read is wrong in some place."""
    read = {type(error).__name__ for error, _ in CASES}

    assert {name for names in own_codes().values() for name in names} - read == {"CqrsDecorError"}


def test_no_two_errors_share_a_code() -> None:
    """People search for the code."""
    assert {code: names for code, names in own_codes().items() if len(names) > 1} == {}


@pytest.mark.parametrize("error", [error for error, _ in CASES], ids=lambda error: type(error).__name__)
def test_an_error_keeps_its_facts_as_attributes(error: CqrsDecorError) -> None:
    """Code that reacts to an error must not read its text."""
    assert error.problem
    assert error.fix
    assert error.code.startswith("CD")
    assert error.args == (error.problem,)


@pytest.mark.parametrize(
    ("family", "digit"),
    [
        (errors.DefinitionError, "1"),
        (errors.DispatchError, "2"),
        (errors.UnitOfWorkError, "3"),
        (errors.StoreError, "4"),
        (errors.BrokerError, "5"),
        (errors.WireError, "6"),
        (errors.ConfigurationError, "7"),
    ],
)
def test_the_first_digit_of_a_code_names_its_family(family: type[CqrsDecorError], digit: str) -> None:
    """One except clause for all that a broker may do, and one chapter of the docs."""
    members = {type(error) for error, _ in CASES if isinstance(error, family)}

    assert members
    assert {member.code[:3] for member in members} == {f"CD{digit}"}


def test_an_error_without_a_fix_still_shows_its_code() -> None:
    """Third parties derive errors of their own."""
    assert str(CqrsDecorError("It broke.")) == "It broke.\n(CD000)"
    assert str(CqrsDecorError("It broke.", where="here")) == "It broke.\nAt: here.\n(CD000)"


def test_a_start_up_error_shows_all_problems_at_once_numbered() -> None:
    """Ten rounds of mending one thing each would be ten starts."""
    group = StartupError("2 problems", [AppNotStartedError("send"), EmitInQueryError("A", "B")])

    assert str(group) == (
        "2 problems\n"
        "1. send was called before the app was started.\n"
        "   Fix: enter it first: `async with app:` (in FastAPI: in the lifespan) (CD201).\n"
        "2. Query 'B' tried to emit 'A'; a query changes nothing.\n"
        "   Fix: emit events from commands and event handlers only (CD303)."
    )


def test_a_part_of_a_start_up_error_is_one_as_well() -> None:
    """`except*` hands over a part of the group; it must still print itself as one."""
    group = StartupError("2 problems", [AppNotStartedError("send"), EmitInQueryError("A", "B")])

    part = group.subgroup(EmitInQueryError)

    assert type(part) is StartupError
    assert [type(error) for error in part.exceptions] == [EmitInQueryError]


def test_a_timeout_is_a_timeout_for_everybody() -> None:
    """Code that knows nothing of this library catches TimeoutError."""
    with pytest.raises(TimeoutError):
        raise HandlerTimeoutError("shop.place_order", 1)


def test_instructions_of_a_handler_are_no_errors_of_the_library() -> None:
    """`except CqrsDecorError` in a handler must not swallow its own `raise Park`."""
    park = Park("no such customer")

    assert (str(park), park.reason) == ("no such customer", "no such customer")
    assert not isinstance(park, CqrsDecorError)


@pytest.mark.parametrize("delay", [2.5, timedelta(seconds=2.5)])
def test_retry_later_takes_seconds_or_a_timedelta(delay: float | timedelta) -> None:
    """The number is what people write; the timedelta is what they compute."""
    later = RetryLater(delay)

    assert (later.delay, str(later)) == (timedelta(seconds=2.5), "try again after 2.5 s")


def test_faults_of_pydantic_become_paths_and_reasons_without_values() -> None:
    """Errors go to logs; what a customer typed does not."""
    faults: list[dict[str, Any]] = [
        {"loc": ("lines", 0, "sku"), "msg": "Field required", "input": {"card": "4111"}},
        {"loc": (), "msg": "Input should be an object", "input": "4111"},
    ]

    assert validation_faults(faults) == [("lines.0.sku", "Field required"), ("", "Input should be an object")]
