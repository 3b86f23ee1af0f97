"""Reads and writes the files of Bi-LoRA's authors."""
