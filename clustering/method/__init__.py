"""The formulas of the method (docs/method.md)."""
