"""`python -m cqrs_decor` is `cqrs-decor`."""

import sys

from cqrs_decor.cli import main

sys.exit(main())
