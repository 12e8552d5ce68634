"""THE WALK: the corridor between the rooms, and the only place that knows their order.

walk.py has the order, passage.py the part of it between admission and settlement, endpoint.py the ASGI application.
"""

from gateway.proxy.endpoint import Proxy
from gateway.proxy.steps import Steps

__all__ = ["Proxy", "Steps"]
