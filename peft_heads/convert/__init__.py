"""An adapter in other forms: stock LoRA, merged, packed or pruned checkpoints, under other module names; and what it is."""
