"""Builds the objects of a job from its configuration. Only this folder imports the packages below ds-engine."""
