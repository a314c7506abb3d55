"""The rows that steer: where they come from, how they are drawn, and the gradient they give."""
