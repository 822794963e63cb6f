"""Reports about a configuration: values and their origin, differences, JSON schema, reference page."""
