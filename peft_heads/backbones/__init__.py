"""What a vision model consists of: the part that sees the images, its blocks and norms, and the classifier.

Depends on torch and `heads` alone.
"""
