"""From the tokens of one model to those of another, byte by byte."""
