"""All tests; a package, so that they and the benchmarks can share `tests.services`."""
