"""Every fact tied to a version of a host (peft, transformers, torch, …), and every private name of theirs that we use.

Each says on what condition it can be deleted."""
