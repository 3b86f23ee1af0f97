"""From a setting to its result: one run, and sweeps of many."""
