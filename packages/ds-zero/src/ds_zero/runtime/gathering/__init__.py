"""Stage 3 during forward and backward: which parameters are gathered when, and for how long."""
