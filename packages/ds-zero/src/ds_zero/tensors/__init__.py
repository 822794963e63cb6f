"""Where the elements of tensors lie: storages, large pages, fingerprints, and stand-ins without any."""
