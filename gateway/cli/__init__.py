"""The `gateway` command: its options, its commands, and how every failure of theirs ends.

Exit codes: 0 done, 1 it failed or a problem was found, 2 the command line or the configuration is wrong.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from typer.core import TyperGroup

from gateway import __version__
from gateway.cli import credits, keys, limits, orgs
from gateway.cli.check import check
from gateway.cli.doctor import doctor
from gateway.cli.explain import explain
from gateway.cli.invocation import Invocation, invocation
from gateway.cli.migrate import migrate
from gateway.cli.output import complain, remark
from gateway.cli.replay import replay
from gateway.cli.run import run
from gateway.cli.serve import serve
from gateway.errors import ConfigError, GatewayError, StoreUnavailable
from gateway.ledger.orgs import BadInput
from gateway.telemetry import configure_logging

FAILED, MISUSED = 1, 2


class Commands(TyperGroup):
    """A group whose commands may raise GatewayError: the person at the terminal gets a sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:  # typer.Context's base is another class in each release of typer
        try:
            return super().invoke(ctx)
        except ConfigError as exc:
            for problem in exc.problems:
                remark(problem)
            raise typer.Exit(MISUSED) from exc
        except GatewayError as exc:
            complain(_in_words(exc))
            raise typer.Exit(MISUSED if isinstance(exc, BadInput) else FAILED) from exc


def _in_words(exc: GatewayError) -> str:
    if isinstance(exc, StoreUnavailable) and exc.detail:
        return f"{exc.detail} (`gateway doctor` looks closer)"
    return str(exc)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A gateway in front of AI APIs: identity, exact limits, prepaid credits, sessions, streaming.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gateway {__version__}")
        raise typer.Exit


@app.callback()
def begin(
    ctx: typer.Context,
    config: Annotated[
        Path, typer.Option("--config", "-c", envvar="GATEWAY_CONFIG", help="The configuration file.")
    ] = Path("gateway.yaml"),
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    ctx.obj = Invocation(config)


@app.command("run")
def run_command(
    ctx: typer.Context,
    demo: Annotated[bool, typer.Option(help="Make demo orgs and print commands to try.")] = True,
) -> None:
    """Run everything on this machine; what is not configured is started here: Valkey, PostgreSQL, an AI router."""
    invoked = invocation(ctx)
    settings = invoked.settings()
    configure_logging(settings.log.format, settings.log.level, sys.stderr)
    uvloop.run(run(settings, invoked.config.parent, demo=demo))


@app.command("serve")
def serve_command(ctx: typer.Context) -> None:
    """Serve, with every server configured: what a container or a unit file starts."""
    settings = invocation(ctx).settings()
    configure_logging(settings.log.format, settings.log.level, sys.stderr)
    serve(settings)


app.command()(check)
app.command()(doctor)
app.command()(migrate)
app.command()(explain)
app.command()(replay)
app.add_typer(orgs.app, name="orgs")
app.add_typer(keys.app, name="keys")
app.add_typer(credits.app, name="credits")
app.add_typer(limits.app, name="limits")


def main() -> None:
    """Run the command line of this process and exit."""
    try:
        app(prog_name="gateway")
    except Exception as exc:
        complain(f"{type(exc).__name__}: {exc}; this is a bug in the gateway, please report it")
        sys.exit(FAILED)
