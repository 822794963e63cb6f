"""Pure arithmetic: which parameter lies in which bucket, and which rank owns which element."""
