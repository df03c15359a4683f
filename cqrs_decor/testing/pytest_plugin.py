"""Fixtures for the tests of applications."""
