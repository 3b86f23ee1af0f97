"""Evidence of our own, on tasks that are generated here."""
