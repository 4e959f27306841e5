"""Runs that begin with the weights of other runs."""
