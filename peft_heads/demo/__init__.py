"""The small ViT that ships with the package, the demo that fine-tunes it, and the generated tasks."""
