"""How each answer format says what it used: one file per format, one line here.

A reader watches bytes pass; it owns neither the connection nor the decision what the usage costs (`charge.py`).
"""

from collections.abc import Mapping
from types import MappingProxyType

from gateway.usage import openai_chat
from gateway.usage.common import Format, Progress, Reader, Unreadable, tokens_of

READERS: Mapping[str, Format] = MappingProxyType(
    {
        "openai_chat": Format(peek=openai_chat.peek, reader=openai_chat.reader, capped=openai_chat.capped),
    }
)

__all__ = ["READERS", "Format", "Progress", "Reader", "Unreadable", "tokens_of"]
