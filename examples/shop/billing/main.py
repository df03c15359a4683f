"""Billing has no HTTP: `CQRS_DECOR_APP=billing.main:cqrs cqrs-decor run all`."""

from cqrs_decor import bootstrap

cqrs = bootstrap(service="billing", discover=["billing"])
