"""The gateway in front of AI APIs. This module holds the version and imports nothing."""

__version__ = "0.1.0"
