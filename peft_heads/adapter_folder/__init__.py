"""What a saved adapter's folder holds beside its weights: labels, model card, scores, checkpoints. Knows no tuner."""
