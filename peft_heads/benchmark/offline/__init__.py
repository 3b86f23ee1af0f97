"""Evidence of our own, on tasks that are generated here."""

from .settings import OFFLINE_TASKS


__all__ = ["OFFLINE_TASKS"]
