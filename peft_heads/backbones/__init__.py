"""What a vision model is made of: blocks, norms, the classifier, and what its parts are called in which version."""
