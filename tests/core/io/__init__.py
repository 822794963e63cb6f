"""Tests of ds_core.io."""
