"""Ranks that call a function of this interpreter, for notebooks and the Python prompt."""
