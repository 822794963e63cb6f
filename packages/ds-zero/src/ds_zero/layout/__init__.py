"""Pure arithmetic: which bucket contains which parameter, and which rank owns which element."""
