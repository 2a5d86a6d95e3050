"""What a launch is told besides its grid."""

from __future__ import annotations

from enum import IntEnum


class Overlap(IntEnum):
    """When the next kernel of the stream may start, if it is launched as a dependent."""

    doc: str

    def __new__(cls, value: int, doc: str) -> Overlap:
        """A number and what it means."""
        member = int.__new__(cls, value)
        member._value_ = value
        member.doc = doc
        return member

    NONE = 0, "when this one is done"
    END = 1, "when this one's tiles are"
    WHOLE = 2, "as soon as this one may read; until then this one fetches its first tiles to L2"
