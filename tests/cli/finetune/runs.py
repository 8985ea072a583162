"""A run of `emlocal finetune`."""

import re
from collections.abc import Callable

from tests.cli.conftest import Outcome

Emlocal = Callable[..., Outcome]
Finetune = Callable[..., Outcome]
ROW = re.compile(r" +(\d+)/(\d+) +\d+\.\d{4} +(\d\.\d{4})? .*%.*\d\.\d$")
"""A line of the table."""
