"""One fit: what it holds, what it refuses, and what it tells."""
