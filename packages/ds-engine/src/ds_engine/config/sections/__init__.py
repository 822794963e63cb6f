"""The sections of `ds_config.json` as typed models; `model` is the top level, `schema` the walk over all keys."""
