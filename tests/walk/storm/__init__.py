"""Trouble on purpose: a fault proxy, the clients and the upstream of storms, and what must not be left behind."""
