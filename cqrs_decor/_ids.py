"""Message ids: UUID version 7, so that they sort by the time they were made (RFC 9562)."""

import uuid_utils


def new_id() -> str:
    """A fresh message id."""
    return str(uuid_utils.uuid7())
