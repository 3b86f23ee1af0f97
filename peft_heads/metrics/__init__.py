"""Metrics for Trainer that need nothing from the Hub."""
