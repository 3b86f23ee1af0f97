"""The mathematics, as pure functions of tensors. Depends on torch alone."""
