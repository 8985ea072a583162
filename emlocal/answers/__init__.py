"""The answer in a text: finding it, and comparing it by its meaning.

Votes, rewards, validation and judges all read answers and gold answers here, so that they agree.

`finding` finds the answer in a text, `programs` the program in one; `gold` reads gold answers; `meaning`
decides which answers are equal, by one `notation`. No engine and no numpy.
"""

from typing import Literal

Extraction = Literal["boxed", "last-number", "regex", "none"]
"""The way to find an answer in a text; see `finding.extract`."""
