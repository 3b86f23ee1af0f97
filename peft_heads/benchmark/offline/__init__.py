"""Evidence of our own, on tasks that are generated here."""

from .offline import OFFLINE_TASKS


__all__ = ["OFFLINE_TASKS"]
