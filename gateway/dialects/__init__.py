"""How each family of clients wants to be refused: one file per dialect, one line here.

A dialect turns a `types.Refusal` into bytes and knows nothing else: not why, not for whom, not over which connection.
"""

from collections.abc import Mapping
from types import MappingProxyType

from gateway.dialects import anthropic, openai, problem
from gateway.dialects.common import Dialect, Rendered

DIALECTS: Mapping[str, Dialect] = MappingProxyType(
    {
        "anthropic": anthropic,
        "openai": openai,
        "problem": problem,
    }
)

__all__ = ["DIALECTS", "Dialect", "Rendered"]
