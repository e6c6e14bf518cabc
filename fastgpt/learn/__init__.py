"""Learn GPT-2 by doing: climb to it, write it, open it, break it, price it."""
