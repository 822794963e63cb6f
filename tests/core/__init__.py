"""Tests of ds_core."""
