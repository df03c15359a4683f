"""Real servers for all tests, those of the core and those of the plugins."""

pytest_plugins = ["tests.services.fixtures"]
