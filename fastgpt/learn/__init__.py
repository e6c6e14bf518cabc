"""Learn by doing: climb, write, open, break, price."""
