"""Where the elements of tensors lie: storages, large pages, fingerprints."""
