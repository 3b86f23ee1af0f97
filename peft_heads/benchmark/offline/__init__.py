"""Evidence of our own, on tasks whose images this package generates."""

from .settings import OFFLINE_TASKS


__all__ = ["OFFLINE_TASKS"]
