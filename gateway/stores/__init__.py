"""The door to Redis and PostgreSQL: the only package that imports their clients.

Everything that leaves here is plain Python values; everything that fails here is `errors.StoreUnavailable`.
"""

from gateway.stores.link import INCARNATION, Reply
from gateway.stores.node import Server, Terms
from gateway.stores.postgres import Postgres, Row
from gateway.stores.redis import Redis, Script
from gateway.stores.sentinel import Sentinels

__all__ = ["INCARNATION", "Postgres", "Redis", "Reply", "Row", "Script", "Sentinels", "Server", "Terms"]
