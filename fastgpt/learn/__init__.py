"""Learn GPT-2 by doing: climb, write, open, break, price. docs/course.md is the path through these commands."""
