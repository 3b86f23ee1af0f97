"""A saved adapter in another form: stock LoRA, a merged, packed or pruned checkpoint, other module names, a report."""
