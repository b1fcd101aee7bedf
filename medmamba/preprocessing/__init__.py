"""From raw cases to the arrays networks see, and back to the grid they came from."""
