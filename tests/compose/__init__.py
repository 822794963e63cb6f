"""What goes with what: small jobs in which two features meet, against the training of one process."""
