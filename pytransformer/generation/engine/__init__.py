"""Continuous batching inside one process: requests join and leave a running batch at every step."""

from .engine import Engine
from .request import Event, Request, Statistics

__all__ = ["Engine", "Event", "Request", "Statistics"]
