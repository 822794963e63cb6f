"""What every room of the configuration uses: errors, kinds of values, batch arithmetic, suggestions."""
