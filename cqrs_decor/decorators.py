"""The decorators of the global registry. They record and return what they decorate unchanged."""

from cqrs_decor.registry import default_registry

command_handler = default_registry.command_handler
query_handler = default_registry.query_handler
event_handler = default_registry.event_handler
middleware = default_registry.middleware
provider = default_registry.provider
on_startup = default_registry.on_startup
on_shutdown = default_registry.on_shutdown
