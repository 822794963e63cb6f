"""What runs during training: buckets, how they are filled, and what happens around `optimizer.step()`."""
