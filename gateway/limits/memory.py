"""The most memory that a key and its value take on a server: what it calls used_memory, without what fragments.

Counted as Redis 7 stores them, which takes most; tests/limits/test_memory.py holds it against the servers themselves.
"""

#: The longest tag that an org's keys can carry: `{ai_credits:org_` and 128 characters.
_OWNER_CHARS_MAX = 145
#: A subject is a digest; a slot of a limit's cardinality is shorter.
_SUBJECT_CHARS_MAX = 22
#: A cluster's entries of the key and of its time to live, and the places of both in tables that are just being doubled;
#: Redis 6.2 takes a little more than 7.
_ENTRY_BYTES = 144
_OBJECT_BYTES = 16
#: Length and end of a text.
_TEXT_BYTES = 6
#: A sorted set of so many members is one text ...
_COMPACT_MEMBERS_MAX = 128
#: ... that says of each its score and its own length; beyond, each has a place in a table and one in a list.
_COMPACT_BYTES = 12
_MEMBER_BYTES = 120
_SORTED_SET_BYTES = 800


def key_bytes_max(name: str) -> int:
    """Of a counter's key, its entry included. name: what stands between the owner's tag and the subject."""
    return _ENTRY_BYTES + _allocated(_OWNER_CHARS_MAX + len(f":l:{name}:") + _SUBJECT_CHARS_MAX + _TEXT_BYTES)


def text_bytes_max(length: int) -> int:
    """Of a value that is a text."""
    return _OBJECT_BYTES + _allocated(length + _TEXT_BYTES)


def sorted_set_bytes_max(members: int, member_chars: int) -> int:
    """Of a sorted set whose scores are times."""
    if members <= _COMPACT_MEMBERS_MAX:
        return _OBJECT_BYTES + _allocated(_TEXT_BYTES + members * (member_chars + _COMPACT_BYTES))
    return _SORTED_SET_BYTES + members * (_allocated(member_chars + _TEXT_BYTES) + _MEMBER_BYTES)


def _allocated(size: int) -> int:
    """What an allocator hands out: four sizes for each doubling, all multiples of 16, and its own mark."""
    step = max(16, 1 << (size.bit_length() - 3))
    return -(-size // step) * step + 8
