"""What a checkpoint is: the directory, the manifest, the data files and the values in them."""
