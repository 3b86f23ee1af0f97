"""Metrics for Trainer that need nothing from the Hub, and times that are compared fairly."""
