"""Reading and writing of files, with direct I/O where it is faster, and their checksums."""
