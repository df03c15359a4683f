"""How generated values are drawn: without a deadline, since a busy machine is no fault of the code."""

from hypothesis import settings

settings.register_profile("unit", deadline=None)
settings.load_profile("unit")
