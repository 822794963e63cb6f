"""The format of a checkpoint: the directory, the manifest, the data files and the encoded values."""
