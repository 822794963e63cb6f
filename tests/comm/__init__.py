"""Tests of ds_comm."""
