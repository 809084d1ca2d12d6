"""Clients that put load on a server, each a process of its own, so that it shares no interpreter with what it
measures."""
