"""What a memory URL looks like."""

from cqrs_decor.errors import BadUrlError


def expect_memory_url(what: str, url: str) -> None:
    if url.rstrip("/") != "memory:":
        raise BadUrlError(what, url, "the memory one has no host, path or options", "memory://")
