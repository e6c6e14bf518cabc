"""Learn by doing: exercises and experiments on the model of gpt.py, each a command of `fastgpt`."""
