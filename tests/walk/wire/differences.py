"""Every difference that the gateway makes on the wire, by the name it has in docs/transparency.md.

A difference is a function from what passes without a gateway to what passes with one. All are applied to every message,
in this order; one that does not concern a message returns it as it is. Nothing else is forgiven.

What only the gateway can know (the request id it chose, the time it signed at) is learned from its own transcript, see
`learned`; what it says about them must follow from that exactly.
"""

from tests.walk.wire.to_client import TO_CLIENT
from tests.walk.wire.to_upstream import TO_UPSTREAM

DIFFERENCES = (*TO_UPSTREAM, *TO_CLIENT)
#: The client's connection is another one than the upstream's: it ends when `closes` says so, and for no other reason.
SEPARATE_CONNECTIONS = "separate-connections"
NAMES = (*(difference.name for difference in DIFFERENCES), SEPARATE_CONNECTIONS)
