"""Which limits and which price a request lives under: plans and policies, compiled once into an immutable PolicySet.

Pure: it decides nothing and counts nothing. `demands` says what to take, admission takes it. What stands where:

    compile      the configuration as PolicySet, CompiledPolicy, Rule; a policy on one route
    conditions   which requests a limit counts: `when`
    asking       what a request is to a policy: `Asking`, and the dimensions read from it
    subjects     whose portion it takes from: `per`
    estimate     the tokens to reserve
    prices       what it costs, and how much of that is to be held
    demands      all of it together, for one request
    refusals     what needs no counter to be refused
"""

from gateway.policy.asking import ANONYMOUS, VALUE_CHARS_MAX, Asking
from gateway.policy.compile import CompiledPolicy, PolicySet, claims_needed, compile_limit, headers_needed
from gateway.policy.demands import demands, message_demands, needs_peek, quote
from gateway.policy.estimate import token_estimate
from gateway.policy.refusals import never_fits, request_exceeds_limit, unknown_plan

__all__ = [
    "ANONYMOUS",
    "VALUE_CHARS_MAX",
    "Asking",
    "CompiledPolicy",
    "PolicySet",
    "claims_needed",
    "compile_limit",
    "demands",
    "headers_needed",
    "message_demands",
    "needs_peek",
    "never_fits",
    "quote",
    "request_exceeds_limit",
    "token_estimate",
    "unknown_plan",
]
