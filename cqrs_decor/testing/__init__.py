"""Doubles, fault injection, the pytest plugin and the conformance kits."""
