"""The engine: one thread that owns the slots, batches what is being computed, and answers requests with events."""

from unspool.engine.engine import Engine, EngineStatistics
from unspool.engine.options import EngineOptions

__all__ = ["Engine", "EngineOptions", "EngineStatistics"]
