"""From a configuration to the objects of a job. Only this room imports the packages beside ds-engine."""
