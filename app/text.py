"""What text from outside may hold."""

from __future__ import annotations

import unicodedata
from typing import Annotated, Final

from pydantic import AfterValidator, StringConstraints

#: Ids that callers choose: safe in a path, in a workflow id and in a log.
IDENTIFIER: Final = r"^[A-Za-z0-9._-]+$"


def _no_controls(text: str) -> str:
    # PostgreSQL cannot store NUL at all, so an event with one would be repeated for ever.
    if any(unicodedata.category(char) in {"Cc", "Cs"} for char in text):
        raise ValueError("control characters are not allowed")
    return text


#: One line that a person wrote, not blank.
Line = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1), AfterValidator(_no_controls)]

#: A short remark, possibly empty.
Remark = Annotated[str, StringConstraints(strip_whitespace=True, max_length=500), AfterValidator(_no_controls)]
