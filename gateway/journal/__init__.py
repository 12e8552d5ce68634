"""What this process has promised and what it is owed, on its own disk before it counts (credits.journal: DIR).

For the double failure: a gateway dies and Redis loses its state before the charges in it were posted. Each process
appends a line before an admitted request goes on and a line before its charge counts; who waits at the same time shares
one fsync. The next process that starts over the same directory, on the same machine, posts what a dead one left there.

    DIR/<process>/lock           locked (flock) as long as the process lives
    DIR/<process>/00000001.log   a segment: lines `CRC32 JSON`, in the order in which they came to count

    held() ──▶ open hold ──settled() of a charge──▶ unconfirmed ──confirmed()──▶ nothing to tell
                   └───────settled() of nothing────────────────────────────────▶ nothing to tell

Segments are deleted oldest first, once nothing in them is open or unconfirmed: the end of a hold is never forgotten
before its beginning. Lines that keep old segments alive are written anew, so that the files never come to much more
than twice what is needed. A journal that cannot be written refuses: StoreUnavailable, for as long as that lasts.
"""

from gateway.journal.journal import Journal, Terms
from gateway.journal.recovery import Recovered

__all__ = ["Journal", "Recovered", "Terms"]
