"""The files of Bi-LoRA's authors, read and written."""
