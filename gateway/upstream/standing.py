"""Whether one target can be connected to and passes its health checks, as far as anybody has found out.

    healthy ──`failures` in a row──► ejected ──backoff over──► on trial ──connected──► healthy
                                        ▲                         │
                                        └───backoff doubled───────┘ failed

Connecting alone decides, because no client can make it fail: a broken or late answer may be the doing of the request,
and whoever sends such requests must not take an upstream away from everybody else. One request at a time is the
trial. Health checks judge beside it: a target is healthy when neither speaks against it.

What began before the last change of state says nothing about the new one: many connections that fail together eject
a target once and double its backoff once, and an old stream's answer does not bring back what cannot be connected to.
"""

import random
from collections.abc import Callable, Mapping
from typing import Protocol

import structlog

#: Backoffs are shorter by up to this share, so that gateways that saw the same failure do not try again together.
JITTER = 0.1

log = structlog.get_logger("gateway.upstream")


class EjectionRules(Protocol):
    """What is read of `config.Ejection`."""

    @property
    def failures(self) -> int: ...
    @property
    def backoff_ms(self) -> int: ...
    @property
    def backoff_max_ms(self) -> int: ...


class Standing:
    """The state of one target. Changes are logged, each once."""

    __slots__ = (
        "_backoff_s",
        "_bad_checks",
        "_clock",
        "_due",
        "_epoch",
        "_failed",
        "_name",
        "_rules",
        "_trial",
        "healthy",
        "spotless",
        "unfit",
    )

    def __init__(self, upstream: str, target: str, rules: EjectionRules, clock: Callable[[], float]) -> None:
        """clock: monotonic seconds."""
        self._name = {"upstream": upstream, "target": target}
        self._rules = rules
        self._clock = clock
        self._epoch = 0
        self._failed = 0
        #: 0 unless ejected.
        self._backoff_s = self._due = 0.0
        #: The extensions of the request that is the trial.
        self._trial: Mapping[str, object] | None = None
        self._bad_checks = 0
        #: Its health check fails.
        self.unfit = False
        #: Not ejected, and no health check says otherwise.
        self.healthy = True
        #: Nothing to forget: a connection that was made changes nothing.
        self.spotless = True

    def welcomes(self) -> bool:
        """Requests may come: the target is healthy, or its backoff is over and nobody is on trial."""
        trial = self._trial
        if trial is not None and trial.get("reached"):
            # Connected already; its answer may take minutes more.
            self.connected()
        return self.healthy or (not self.unfit and self._trial is None and self._clock() >= self._due)

    def begin(self, extensions: Mapping[str, object]) -> int:
        """A request goes to the target; `end` and `failed` want the number that this returns.

        extensions: of its httpx.Request, where the transport says whether it was `reached`.
        """
        if self._backoff_s and self._trial is None and self._clock() >= self._due:
            self._trial = extensions
        return self._epoch

    def end(self, epoch: int, extensions: Mapping[str, object], *, connected: bool) -> None:
        """What `begin` began is over. A trial that was neither connected nor failed leaves it to the next to decide."""
        if connected:
            self.connected(epoch)
        elif self._trial is extensions:
            self._trial = None

    def connected(self, epoch: int | None = None) -> None:
        """The target was there for what began at `epoch`; None: just now."""
        if epoch is not None and epoch != self._epoch:
            return
        self._failed, self.spotless = 0, True
        if self._backoff_s:
            self._backoff_s, self._trial = 0.0, None
            self._epoch += 1
            log.info("target can be connected to again", **self._name)
            self._judge()

    def failed(self, epoch: int, extensions: Mapping[str, object], error: Exception) -> None:
        """A connection could not be made."""
        if epoch != self._epoch:
            return
        if not self._backoff_s:
            self._failed, self.spotless = self._failed + 1, False
            if self._failed >= self._rules.failures:
                self._pause(self._rules.backoff_ms / 1000)
                backoff_ms = round(self._backoff_s * 1000)
                log.warning("target ejected", **self._name, backoff_ms=backoff_ms, error=str(error))
                self._judge()
        elif self._trial is extensions:
            self._pause(2 * self._backoff_s)
        # Else it was tried for want of a better one, before its time: the backoff stays as it is.

    def checked(self, fault: str | None, faults_max: int) -> None:
        """A health check found the target well (None), or at fault; `faults_max` faults in a row count."""
        if fault is None:
            self._bad_checks = 0
            if self.unfit:
                self.unfit = False
                log.info("target passes its health check again", **self._name)
                self._judge()
            self.connected()
            return
        self._bad_checks += 1
        if self._bad_checks >= faults_max and not self.unfit:
            self.unfit = True
            log.warning("target fails its health check", **self._name, fault=fault)
            self._judge()

    def _pause(self, backoff_s: float) -> None:
        self._backoff_s = min(backoff_s, self._rules.backoff_max_ms / 1000)
        self._due = self._clock() + self._backoff_s * (1 - JITTER * random.random())
        self._trial = None
        self._epoch += 1

    def _judge(self) -> None:
        self.healthy = not self.unfit and not self._backoff_s
