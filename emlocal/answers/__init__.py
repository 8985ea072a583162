"""What an answer is: found in a text, and compared by what it means.

Votes, rewards, validation and judges all read answers and gold answers here, so that they agree.

`finding` finds the answer of a text, `programs` the program in one; `gold` reads gold answers; `meaning` says
which answers are equal, by one `notation`. No engine and no numpy.
"""

from typing import Literal

Extraction = Literal["boxed", "last-number", "regex", "none"]
"""Where an answer is found in a text; see `finding.extract`."""
