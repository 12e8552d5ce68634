"""The gateway's own pages, outside the walk: `/-/health`, `/-/ready`, `/-/metrics`. No credential, no secrets."""

from gateway.ops.gauges import watch_gauges
from gateway.ops.health import Health, Probe, Report
from gateway.ops.pages import ops_app

__all__ = ["Health", "Probe", "Report", "ops_app", "watch_gauges"]
