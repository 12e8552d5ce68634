"""What requests met, would meet and would have met: what `gateway limits show`, `explain` and `replay` know.

Decides as the walk does, with its own rooms, but forwards nothing and takes nothing. What stands where:

    logline      the access log as it is read back: lines, files, what is no line
    asking       from a line to what its request was to a policy
    applying     which limits of a policy a request meets, and why it does not meet the others
    verdict      what the gateway would answer, given what the limits say
    peeking      what Redis says of limits now, taking nothing; the only part that does any I/O but reading logs
    story        what became of a request, told from its line
    order        lines of any number of logs in the order in which Redis judged them
    world        counters in this process, on the log's clock
    rerun        a log against other policies
    tally        what such a run has found
"""
