"""Sections that divide a model or its experts among ranks."""
