"""What text from outside may hold."""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Final

from pydantic import AfterValidator, StringConstraints

from app.domain.text import printable

#: Ids that callers choose: safe in a path, in a workflow id and in a log.
IDENTIFIER: Final = r"^[A-Za-z0-9._-]+$"

#: A number as people write it. Python takes more for one: `1_000`, the digits of other scripts, spaces around it.
WHOLE_NUMBER: Final = re.compile(r"-?[0-9]+", re.ASCII)
DECIMAL_NUMBER: Final = re.compile(r"-?[0-9]+(\.[0-9]+)?", re.ASCII)

#: Of a name that a caller chose so much is repeated to it.
MAX_NAME: Final = 64

#: Cc, Cs: control characters, halves of characters. Cf: what shows nothing, or turns round the text after it. Zl, Zp:
#: line breaks that few programs know. Co, Cn: what means nothing, or something else to each reader.
_UNREADABLE: Final = frozenset({"Cc", "Cs", "Cf", "Zl", "Zp", "Co", "Cn"})
#: Cf that words of some scripts, and emoji, are written with.
_JOINERS: Final = frozenset("\u200c\u200d")
#: Letters and symbols by their category that are drawn as nothing: the fillers of Hangul, and Braille without a dot.
_BLANKS: Final = frozenset("\u115f\u1160\u3164\uffa0\u2800")


def whole_number(text: object) -> object:
    """A whole number as text, if it is one as people write it; anything else as it is.

    Raises:
        ValueError: it is a text of another kind, which Python may well take for a number.
    """
    if isinstance(text, str) and not WHOLE_NUMBER.fullmatch(text):
        raise ValueError("not a whole number: digits only")
    return text


def _no_controls(text: str) -> str:
    # PostgreSQL cannot store NUL at all, so an event with one would be repeated for ever.
    if any(unicodedata.category(char) in {"Cc", "Cs"} for char in text):
        raise ValueError("control characters are not allowed")
    return text


def readable(text: str) -> str:
    """`text`, if whoever reads it sees what is there.

    Raises:
        ValueError: a character shows nothing, or changes how others are shown; or all of it shows nothing.
    """
    # The plain case first: a review waits for nothing else than this.
    if text.isascii() and text.isprintable():
        return text
    for char in text:
        if unicodedata.category(char) in _UNREADABLE and char not in _JOINERS:
            raise ValueError(f"the character U+{ord(char):04X} is not allowed: it cannot be seen, or changes the rest")
    if text and not any(map(_is_seen, text)):
        raise ValueError("nothing of it can be seen")
    return text


def _is_seen(char: str) -> bool:
    # The others are spaces, joiners, and marks on a letter that would have to be there.
    return unicodedata.category(char)[0] in "LNPS" and char not in _BLANKS


def shown(name: str) -> str:
    """A name that a caller chose, fit to be repeated: not at any length, and nothing that cannot be seen."""
    return printable(name[:MAX_NAME])


#: One line, not blank, by the rule that recorded histories were decided by.
OldLine = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1), AfterValidator(_no_controls)]

#: One line that a person wrote, not blank.
Line = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1), AfterValidator(readable)]

#: A short remark, possibly empty.
Remark = Annotated[str, StringConstraints(strip_whitespace=True, max_length=500), AfterValidator(readable)]

#: What a partner calls something of its own: kept as it is, shown to people, and stored.
Reference = Annotated[str, StringConstraints(min_length=1, max_length=255), AfterValidator(readable)]
