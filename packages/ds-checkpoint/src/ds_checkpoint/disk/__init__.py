"""Bytes to a disk and back, past the page cache where that pays, and their checksums."""
