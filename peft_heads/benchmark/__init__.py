"""Benchmarks of the papers under one protocol: results, published rows, statistics and report."""
