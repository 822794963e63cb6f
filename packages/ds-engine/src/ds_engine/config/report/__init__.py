"""What can be shown of a configuration: values and their origin, differences, JSON schema, reference page."""
