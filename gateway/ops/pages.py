"""The pages themselves: JSON for people and probes, the Prometheus text format for scrapers."""

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway import __version__
from gateway.ops.health import Health, Report

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def ops_app(health: Health, metrics_text: Callable[[], bytes]) -> Starlette:
    """Routes below `/-/`.

    `/-/health`: 200 while requests can be admitted, 503 while not; the body names every dependency and how it is.
    `/-/ready`: 200 when new requests should come here; 503 while draining or down.
    """

    async def show_health(_: Request) -> JSONResponse:
        report = await health.report()
        return JSONResponse(_document(report, health.draining), status_code=200 if report.can_serve else 503)

    async def show_ready(_: Request) -> JSONResponse:
        report = await health.report()
        ready = report.can_serve and not health.draining
        reason = "draining" if health.draining else report.status
        return JSONResponse({"ready": ready, "status": reason}, status_code=200 if ready else 503)

    async def show_metrics(_: Request) -> Response:
        return Response(metrics_text(), headers={"content-type": METRICS_TYPE})

    return Starlette(
        routes=[
            Route("/-/health", show_health),
            Route("/-/ready", show_ready),
            Route("/-/metrics", show_metrics),
        ]
    )


def _document(report: Report, draining: bool) -> dict[str, object]:
    return {
        "status": report.status,
        "draining": draining,
        "version": __version__,
        "checks": {
            name: {"ok": finding.ok, "says": finding.says, "latency_ms": finding.latency_ms}
            for name, finding in report.findings.items()
        },
    }
