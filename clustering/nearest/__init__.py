"""The nearest centres of rows, exact: in torch, by small codes, in Triton."""
