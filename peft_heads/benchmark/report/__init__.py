"""Tables and figures of a folder of results, beside the published numbers."""
