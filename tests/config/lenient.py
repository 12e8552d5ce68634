"""How servers of several make find the handler of a raw path, written after their manuals and not after the gateway.

Each takes an absolute raw path without a query and gives the path that it compares with its handlers, or None where it
answers an error itself. `insensitive` servers compare without regard to case.
"""

import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote


@dataclass(frozen=True, slots=True)
class Server:
    name: str
    read: Callable[[str], str | None]
    insensitive: bool = False
    #: `/a/` finds the handler of `/a`.
    slash_is_optional: bool = False

    def handler(self, raw: str, patterns: list[str]) -> str | None:
        """The first of `patterns` (exact, or a prefix ending in `/*`) that takes `raw` here."""
        path = self.read(raw)
        if path is None:
            return None
        if self.insensitive:
            path = path.lower()
        for pattern in patterns:
            own = pattern.lower() if self.insensitive else pattern
            if own.endswith("/*"):
                if path.startswith(own[:-1]):
                    return pattern
            elif path == own or (self.slash_is_optional and path == own + "/"):
                return pattern
        return None


def _hex(raw: str) -> str | None:
    """Percent-decoded byte by byte; None for what is no escape."""
    out = []
    at = 0
    while at < len(raw):
        if raw[at] != "%":
            out.append(raw[at])
            at += 1
            continue
        digits = raw[at + 1 : at + 3]
        if len(digits) != 2 or any(digit not in "0123456789abcdefABCDEF" for digit in digits):
            return None
        out.append(chr(int(digits, 16)))
        at += 3
    return "".join(out)


def express(raw: str) -> str | None:
    """Matches the path as it came; names of handlers are compared loosely."""
    return raw


def nginx(raw: str) -> str | None:
    """`location`: decoded, slashes merged, dots resolved; climbing and NUL are errors."""
    path = _hex(raw)
    if path is None or "\0" in path:
        return None
    kept: list[str] = []
    parts = re.sub("/+", "/", path).split("/")[1:]
    for part in parts:
        if part == "..":
            if not kept:
                return None
            kept.pop()
        elif part != ".":
            kept.append(part)
    if parts[-1] in (".", ".."):
        kept.append("")
    return "/" + "/".join(kept)


def nginx_raw_slashes(raw: str) -> str | None:
    """With `merge_slashes off`."""
    path = _hex(raw)
    if path is None:
        return None
    out: list[str] = []
    parts = path.split("/")[1:]
    for part in parts:
        if part == ".." and out:
            out.pop()
        elif part not in (".", ".."):
            out.append(part)
    return "/" + "/".join([*out, ""] if parts[-1] in (".", "..") else out)


def tomcat(raw: str) -> str | None:
    """Path parameters go first, then it decodes, takes backslashes for slashes and normalises."""
    path = _hex("/".join(part.split(";")[0] for part in raw.split("/")))
    if path is None:
        return None
    path = path.replace("\\", "/")
    while "//" in path:
        path = path.replace("//", "/")
    while "/./" in path:
        path = path.replace("/./", "/", 1)
    while (at := path.find("/../")) >= 0:
        if at == 0:
            return None
        path = path[: path.rindex("/", 0, at)] + path[at + 3 :]
    if path.endswith("/.."):
        path = path[: path.rindex("/", 0, len(path) - 3)] + "/" if path != "/.." else "/"
    return path[:-1] if path.endswith("/.") else path


def go_servemux(raw: str) -> str | None:
    """net/http: decoded, then path.Clean with the trailing slash kept (it redirects; clients follow)."""
    path = _hex(raw)
    if path is None:
        return None
    clean = posixpath.normpath("/" + path.lstrip("/"))
    return clean + "/" if path.endswith("/") and clean != "/" else clean


def node_url(raw: str) -> str | None:
    """`new URL(req.url, base).pathname`, the WHATWG way: backslashes, hosts after `//`, dots escaped or not."""
    path = raw.replace("\\", "/").replace("\t", "").split("#")[0].split("?")[0]
    if path.startswith("//"):
        path = "/" + path.lstrip("/").partition("/")[2]
    out: list[str] = []
    parts = path.split("/")[1:]
    for part in parts:
        dots = part.lower().replace("%2e", ".")
        if dots == "..":
            out = out[:-1]
        elif dots != ".":
            out.append(part)
    if parts[-1].lower().replace("%2e", ".") in (".", ".."):
        out.append("")
    return "/" + "/".join(out)


def node_url_decoded(raw: str) -> str | None:
    path = node_url(raw)
    return None if path is None else _hex(path)


def by_segment(raw: str) -> str | None:
    """Cut at the slashes as they came; each segment is decoded by itself, so an escaped slash separates nothing."""
    out: list[str] = []
    for segment in raw.split("/")[1:]:
        text = _hex(segment)
        if text is None:
            return None
        text = text.partition(";")[0]
        if text == "..":
            out = out[:-1]
        elif text != ".":
            out.append(text.replace("/", "%2F"))
    return "/" + "/".join(out)


def wsgi(raw: str) -> str | None:
    """PATH_INFO: decoded leniently, nothing else."""
    return unquote(raw, "latin-1")


def iis(raw: str) -> str | None:
    """Decodes until nothing is left to decode, and every slash is a slash."""
    for _ in range(3):
        path = unquote(raw, "latin-1")
        if path == raw:
            break
        raw = path
    return posixpath.normpath("/" + raw.replace("\\", "/").lstrip("/"))


def behind_nginx(raw: str) -> str | None:
    """A proxy that sends on what it normalised, decoded, to a server that decodes again."""
    path = nginx(raw)
    return None if path is None else tomcat(path.split("?")[0].split("#")[0])


SERVERS = [
    Server("express", express, insensitive=True, slash_is_optional=True),
    Server("express strict", express),
    Server("nginx", nginx),
    Server("nginx, slashes kept", nginx_raw_slashes),
    Server("tomcat", tomcat),
    Server("go", go_servemux),
    Server("node URL", node_url, slash_is_optional=True),
    Server("node URL, decoded", node_url_decoded, insensitive=True),
    Server("by segment", by_segment),
    Server("wsgi", wsgi),
    Server("iis", iis, insensitive=True, slash_is_optional=True),
    Server("tomcat behind nginx", behind_nginx),
]
