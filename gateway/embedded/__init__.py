"""Real servers for a gateway that was given none: Valkey, PostgreSQL and a demo AI router, as child processes.

Does not import `demo_router`, which is a program of its own.
"""

from gateway.embedded.demo import EmbeddedDemoRouter
from gateway.embedded.postgres import EmbeddedPostgres
from gateway.embedded.process import EmbeddedError
from gateway.embedded.servers import EmbeddedUrls, embedded
from gateway.embedded.valkey import EmbeddedValkey

__all__ = ["EmbeddedDemoRouter", "EmbeddedError", "EmbeddedPostgres", "EmbeddedUrls", "EmbeddedValkey", "embedded"]
