"""A command line with a configuration of its own, run in this process unless a test says otherwise."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import structlog
from typer.testing import CliRunner

from gateway.cli import app

GATEWAY_YAML = """\
stores: { redis: "${REDIS_URL:-embedded}", postgres: "${DATABASE_URL:-embedded}" }
upstreams:
  router: { targets: ["${AI_ROUTER_URL:-demo}"] }
identity:
  - api_key:
plans:
  trial: { credits: 100, policy: trial }
  pro: { credits: 10000, policy: trial }
routes:
  - { path: /v1/chat/completions, method: POST, upstream: router, dialect: openai, usage: openai_chat }
  - { path: /files/*, upstream: router }
"""

TRIAL_YAML = """\
policy: trial
limits:
  - { name: rpm, count: requests, limit: 20, window: 1m }
  - { name: tpm, count: tokens, limit: 20000, window: 1m }
price: { per_request: 2 }
"""


@pytest.fixture
def database_url(empty_database_url: str) -> str:
    """What the schema is made of is what is tested here."""
    return empty_database_url


@dataclass(frozen=True)
class Said:
    """What a command said, and how it ended."""

    exit_code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


@dataclass
class CommandLine:
    """`gateway --config <directory>/gateway.yaml ARGS`"""

    directory: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        return self.directory / "gateway.yaml"

    def configure(self, old: str, new: str) -> None:
        text = self.config.read_text()
        assert old in text
        self.config.write_text(text.replace(old, new))

    def __call__(self, *args: str, stdin: bytes | None = None) -> Said:
        result = CliRunner().invoke(app, ["--config", str(self.config), *args], input=stdin, env=self._environment())
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Said(result.exit_code, result.stdout, result.stderr)

    def _environment(self) -> Mapping[str, str | None]:
        """None takes a variable of the machine out of the way."""
        ours = ("REDIS_URL", "DATABASE_URL", "AI_ROUTER_URL", "GATEWAY_CONFIG")
        return dict.fromkeys(ours) | self.env

    def do(self, *args: str) -> Said:
        """The command, which succeeds."""
        said = self(*args)
        assert said.exit_code == 0, said
        return said


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[CommandLine]:
    """Nothing is running, nothing is set in the environment."""
    (tmp_path / "gateway.yaml").write_text(GATEWAY_YAML)
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "trial.yaml").write_text(TRIAL_YAML)
    yield CommandLine(tmp_path)
    # Commands point the log at the standard error of their process, here one that the runner has closed.
    structlog.reset_defaults()


@pytest.fixture
def empty(gateway: CommandLine, database_url: str, redis_url: str) -> CommandLine:
    """Both stores answer; the database has no schema yet."""
    gateway.env |= {"DATABASE_URL": database_url, "REDIS_URL": redis_url}
    return gateway


@pytest.fixture
def migrated(empty: CommandLine) -> CommandLine:
    """Both stores are ready."""
    empty.do("migrate")
    return empty


@pytest.fixture
def acme(migrated: CommandLine) -> CommandLine:
    """Org `acme` of plan `trial` is there, with its 100 credits."""
    migrated.do("orgs", "add", "acme", "--plan", "trial")
    return migrated
