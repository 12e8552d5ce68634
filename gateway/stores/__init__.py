"""The door to Redis and PostgreSQL: the only package that imports their clients.

Everything that leaves here is plain Python values; everything that fails here is `errors.StoreUnavailable`.
"""

from gateway.stores.postgres import Postgres, Row
from gateway.stores.redis import Redis, RedisAddress, Reply, Script

__all__ = ["Postgres", "Redis", "RedisAddress", "Reply", "Row", "Script"]
