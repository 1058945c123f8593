"""The real trainer on fake tensors, and the meter that watches it."""
