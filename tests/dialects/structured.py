"""RFC 9651 Lists of Items, read back strictly, after the algorithms of its section 4.2. Shares nothing with the writer.

A value is an int, a Decimal, a str (String), or a Token. Anything that the RFC does not allow is a ValueError.
"""

from decimal import Decimal

Bare = int | Decimal | str


class Token(str):
    """Told apart from a String."""

    __slots__ = ()


Item = tuple[Bare, dict[str, Bare]]

_ALPHA = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_DIGITS = "0123456789"
_TOKEN = _ALPHA + _DIGITS + "!#$%&'*+-.^_`|~:/"


def parse_list(field: bytes) -> list[Item]:
    reader = _Reader(field.decode("ascii"))
    reader.skip(" ")
    items: list[Item] = []
    while reader.left:
        items.append(reader.item())
        reader.skip(" \t")
        if not reader.left:
            return items
        reader.expect(",")
        reader.skip(" \t")
        if not reader.left:
            raise ValueError("a comma at the end")
    return items


class _Reader:
    def __init__(self, left: str) -> None:
        self.left = left

    def skip(self, letters: str) -> None:
        self.left = self.left.lstrip(letters)

    def expect(self, letter: str) -> None:
        if not self.left.startswith(letter):
            raise ValueError(f"{letter!r} expected before {self.left!r}")
        self.left = self.left[1:]

    def take(self, letters: str) -> str:
        rest = self.left.lstrip(letters)
        taken, self.left = self.left[: len(self.left) - len(rest)], rest
        return taken

    def item(self) -> Item:
        bare = self.bare()
        parameters: dict[str, Bare] = {}
        while self.left.startswith(";"):
            self.expect(";")
            self.skip(" ")
            if self.left[:1] not in (*_ALPHA[:26], "*"):
                raise ValueError(f"no key: {self.left!r}")
            key = self.take(_ALPHA[:26] + _DIGITS + "_-.*")
            self.expect("=")
            parameters[key] = self.bare()
        return bare, parameters

    def bare(self) -> Bare:
        first = self.left[:1]
        if first == '"':
            return self.string()
        if first and first in _ALPHA + "*":
            return Token(self.take(_TOKEN))
        return self.number()

    def number(self) -> int | Decimal:
        sign = -1 if self.left.startswith("-") else 1
        self.left = self.left.removeprefix("-")
        whole = self.take(_DIGITS)
        if not whole:
            raise ValueError(f"no number: {self.left!r}")
        if not self.left.startswith("."):
            if len(whole) > 15:
                raise ValueError(f"too long for an Integer: {whole}")
            return sign * int(whole)
        self.expect(".")
        fraction = self.take(_DIGITS)
        if len(whole) > 12 or not 1 <= len(fraction) <= 3:
            raise ValueError(f"no Decimal: {whole}.{fraction}")
        return sign * Decimal(f"{whole}.{fraction}")

    def string(self) -> str:
        self.expect('"')
        said = ""
        while self.left:
            letter, self.left = self.left[0], self.left[1:]
            if letter == '"':
                return said
            if letter == "\\":
                letter, self.left = self.left[:1], self.left[1:]
                if letter not in ('"', "\\"):
                    raise ValueError("a backslash before neither a quote nor a backslash")
            elif not " " <= letter <= "~":
                raise ValueError(f"{letter!r} in a String")
            said += letter
        raise ValueError("a String without its end")
